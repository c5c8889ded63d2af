"""Real servers for tests, each in a process of its own.

    from tests.support.serving import running_server

    with running_server(max_jobs=1) as server:
        client = gradwire.connect(server.address)
        server.wait_for_log("some-job-id")

Run as a script, this module is that process: its one argument is the
settings as JSON, it prints one line of JSON when it listens, and SIGTERM,
SIGINT or the end of its standard input make it drain: so it does not outlive
the tests, however they end.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

BACKEND = os.environ.get("GRADWIRE_TEST_BACKEND", "numpy")
"""What servers compute with here: numpy, cupy to run the suite on a GPU, or simulated
to run what is about sessions with tensors in a device's own memory.

Tests that are about the NumPy backend, or that put a backend of their own in
its place, give their server one instead."""

if BACKEND not in {"numpy", "cupy", "simulated"}:
    raise ValueError(f"GRADWIRE_TEST_BACKEND is {BACKEND!r}: expected numpy or cupy")

# CUDA loads its libraries and makes a context: seconds, on a busy host many.
START_TIMEOUT_S = 90.0 if BACKEND == "cupy" else 30.0
STOP_TIMEOUT_S = 20.0


_IMPORTS = (
    "gradwire_server.api.standard",
    "gradwire_server.backends.numpy.plugin",
    "gradwire_server.server",
)
"""What every server imports until it listens."""


class ServerProcess:
    """A server that a test talks to."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self._log = log
        self.addresses: tuple[str, ...] = ()
        self.metrics_url = ""
        """URL of the metrics, if the server serves them."""
        self.health_address = ""
        """Address of the port for health probes, if the server has one."""

    @property
    def address(self) -> str:
        return self.addresses[0]

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def logs(self) -> str:
        """Everything that the server has logged: one JSON object a line."""
        return self._log.read_text()

    @property
    def records(self) -> list[dict[str, Any]]:
        """The log's records, each with every attribute that it was given."""
        lines = self.logs.split("\n")[:-1]
        return [json.loads(line) for line in lines if line.startswith("{")]

    def wait_for_log(
        self, wanted: str | Callable[[dict[str, Any]], bool], timeout_s: float = 20.0
    ) -> dict[str, Any]:
        """The first record that holds a text or satisfies a condition."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for record in self.records:
                if (
                    wanted in json.dumps(record)
                    if isinstance(wanted, str)
                    else wanted(record)
                ):
                    return record
            time.sleep(0.01)
        raise AssertionError(f"no such record in {timeout_s} s in:\n{self.logs}")

    def kill(self) -> None:
        """End the server as a crash would."""
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def running_server(
    *, env: dict[str, str] | None = None, prefix: Sequence[str] = (), **settings: Any
) -> Iterator[ServerProcess]:
    """A server with these `gradwire_server.Settings`, on a port of its own.

    Args:
        env: Environment variables beside this process's.
        prefix: A command that runs the server, for example in a network namespace.
        settings: Fields of `Settings`; those left out are the defaults, but
            that it listens on port 0 of 127.0.0.1, computes with `BACKEND` and
            drains for at most a second. And `slow_decoder`: whether it reads every
            message of a stream by the generated class; and `clock_jumps`: whether
            its wall clock is an hour off whenever it is asked, forth and back;
            `device_memory`: bytes of each device of the backend "simulated";
            `dies_at_rename`: the number of the first file that it would rename into
            place, and is killed instead; `file_bytes`: most bytes of a file that it can
            write, as on a full disk; `limits_log`: whether it leaves out log lines of
            calls that fail alike, as servers do, while most tests look for single
            lines; `queued_every_s`: how often it tells a job at least that it waits.
    """
    settings = {
        "listen": ["127.0.0.1:0"],
        "backend": BACKEND,
        "grace": 1.0,
    } | settings
    with tempfile.TemporaryDirectory(prefix="gradwire-test-") as scratch:
        log = Path(scratch) / "log"
        with log.open("wb") as stderr:
            process = _start(settings, os.environ | (env or {}), prefix, stderr)
        server = ServerProcess(process, log)
        watchdog = _kill_after(process, START_TIMEOUT_S)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            watchdog.cancel()
            if not line:
                process.wait(STOP_TIMEOUT_S)
                raise RuntimeError(f"the server did not start:\n{server.logs}")
            ready = json.loads(line)
            server.addresses = tuple(ready["addresses"])
            server.metrics_url = ready["metrics"]
            server.health_address = ready["health"]
            yield server
        finally:
            watchdog.cancel()
            if process.poll() is None:
                process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def _start(
    settings: dict[str, Any], env: dict[str, str], prefix: Sequence[str], stderr: Any
) -> Any:
    # Where this module is the server's process, there is no package of tests.
    from tests.support import forking

    argument = json.dumps(settings)
    # CUDA is not to be forked.
    if not prefix and BACKEND != "cupy" and forking.possible(env):
        with contextlib.ExitStack() as opened:
            ends = [*os.pipe(), *os.pipe()]
            for end in (ends[0], ends[3]):
                opened.callback(os.close, end)
            pipes = (os.fdopen(ends[1], "wb"), os.fdopen(ends[2], "rb"), None)
            pid = forking.start(
                "tests.support.serving:main",
                [argument],
                env,
                imports=_IMPORTS,
                stdin=ends[0],
                stdout=ends[3],
                stderr=stderr.fileno(),
            )
            return forking.ForkedProcess(pid, pipes)
    return subprocess.Popen(
        [*prefix, sys.executable, __file__, argument],
        stdout=subprocess.PIPE,
        stderr=stderr,
        stdin=subprocess.PIPE,
        env=env,
    )


def _kill_after(process: subprocess.Popen[bytes], seconds: float) -> Any:
    timer = threading.Timer(seconds, process.kill)
    timer.daemon = True
    timer.start()
    return timer


class _JsonFormatter(logging.Formatter):
    _USUAL = frozenset(logging.makeLogRecord({}).__dict__) - {"levelname", "name"}

    def format(self, record: logging.LogRecord) -> str:
        fields = {k: v for k, v in vars(record).items() if k not in self._USUAL}
        fields["message"] = record.getMessage()
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


def _die_at_rename(number: int) -> None:
    rename, renamed = Path.replace, itertools.count(1)

    def replace(path: Path, target: Any) -> Path:
        if next(renamed) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(path, target)

    Path.replace = replace  # type: ignore[method-assign]


async def _serve(settings: dict[str, Any]) -> None:
    from gradwire_protocol import framing, limits
    from gradwire_server import Server, Settings
    from gradwire_server.observability import access_log

    if settings.pop("slow_decoder", False):
        framing.decode_request = framing.decode_request_slow
    if settings.pop("clock_jumps", False):
        right, hours = time.time, itertools.cycle((3600.0, -3600.0))
        time.time = lambda: right() + next(hours)
    if not settings.pop("limits_log", False):
        access_log.MOST_ALIKE = sys.maxsize
    if "file_bytes" in settings:
        most = settings.pop("file_bytes")
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    if "queued_every_s" in settings:
        limits.QUEUED_EVERY_S = settings.pop("queued_every_s")
    if "dies_at_rename" in settings:
        _die_at_rename(settings.pop("dies_at_rename"))
    if settings.get("state_dir"):
        settings["state_dir"] = Path(settings["state_dir"])
    backend: Any = None
    memory = settings.pop("device_memory", [2 << 30])
    if settings["backend"] == "simulated":
        sys.path.insert(0, str(Path(__file__).parents[2]))
        from tests.support.simulated_backend import SimulatedBackend

        settings["backend"] = "numpy"
        backend = SimulatedBackend(*memory)
    lists_as_tuples = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in settings.items()
    }
    asked_to_stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, asked_to_stop.set)

    def parent_has_ended() -> None:
        loop.remove_reader(sys.stdin.fileno())
        asked_to_stop.set()

    loop.add_reader(sys.stdin.fileno(), parent_has_ended)
    server = Server(Settings(**lists_as_tuples), backend)
    await server.start()
    ready = {
        "addresses": list(server.addresses),
        "metrics": server.metrics_url,
        "health": server.health_address,
    }
    print(json.dumps(ready), flush=True)
    await asked_to_stop.wait()
    await server.drain()


def main() -> None:
    """Be the server."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter())
    logging.basicConfig(level=logging.DEBUG, handlers=[handler])
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    asyncio.run(_serve(json.loads(sys.argv[1])))


if __name__ == "__main__":
    main()
