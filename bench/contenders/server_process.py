"""The server of a contender, in a separate process."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Self

HOST = os.environ.get("BENCH_SERVER_HOST", "127.0.0.1")
"""Listen address of TCP contenders."""

_BEFORE = shlex.split(os.environ.get("BENCH_SERVER_COMMAND", ""))
"""Prefix of a server's command, such as ``ip netns exec NAME``."""

_ADDRESS = re.compile(r"(?:serves on|ready at) (\S+)")
_USED = "used so far: "
_ANSWER_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Used:
    """What a process has used so far, with all its threads, ended ones too."""

    cpu_s: float
    """Processor time, the kernel's for it included."""

    switches: int
    """Context switches: waits, and turns that the scheduler ended."""

    @classmethod
    def here(cls) -> Used:
        """What this process has used."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        cpu_s = used.ru_utime + used.ru_stime
        return cls(cpu_s, used.ru_nvcsw + used.ru_nivcsw)

    def since(self, before: Used) -> Used:
        """What was used after `before`."""
        return Used(self.cpu_s - before.cpu_s, self.switches - before.switches)


class ServerProcess:
    """A server command that prints a line with its address when ready."""

    def __init__(self, process: subprocess.Popen[str], address: str) -> None:
        self._process = process
        self.address = address

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def host_and_port(self) -> tuple[str, int]:
        host, _, port = self.address.rpartition(":")
        return host, int(port)

    @classmethod
    def of_module(cls, module: str, *arguments: str, keep: Sequence[int] = ()) -> Self:
        """Run a module as a script that inherits the descriptors `keep`."""
        return cls.start([sys.executable, "-m", module, *arguments], keep=keep)

    @classmethod
    def start(
        cls, command: list[str], *, keep: Sequence[int] = (), timeout_s: float = 30.0
    ) -> Self:
        """Run `command` until `stop`; it inherits this process's environment.

        Raises:
            RuntimeError: The command ended, or printed no address in time.
        """
        process = subprocess.Popen(
            [*_BEFORE, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=keep,
        )
        too_late = threading.Timer(timeout_s, process.kill)
        too_late.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if found := _ADDRESS.search(line):
                    return cls(process, found[1])
        finally:
            too_late.cancel()
        raise RuntimeError(f"no address from {command}: exit status {process.wait()}")

    def used(self) -> Used:
        """What the process has used so far, as its `report_usage` says.

        The kernel tells another process the context switches of living threads only.

        Raises:
            RuntimeError: The process ended, or does not answer.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        too_late = threading.Timer(_ANSWER_TIMEOUT_S, self._process.kill)
        too_late.start()
        try:
            # Past the buffer, which could no longer be closed if the process is gone.
            os.write(self._process.stdin.fileno(), b"\n")
            for line in self._process.stdout:
                _, found, used = line.partition(_USED)
                if found:
                    return Used(**json.loads(used))
        except BrokenPipeError:
            pass
        finally:
            too_late.cancel()
        raise RuntimeError(f"a server ended: exit status {self._process.wait()}")

    def stop(self) -> None:
        """Ask the process to end; kill it after ten seconds."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def say_ready(address: str) -> None:
    """Print the line of a ready server, and answer `ServerProcess.used` from now on."""
    report_usage()
    print(f"ready at {address}", flush=True)


def report_usage() -> None:
    """Answer `ServerProcess.used` in a thread of this process."""
    threading.Thread(target=_report_usage, daemon=True).start()


def _report_usage() -> None:
    # Not sys.stdin, whose lock a thread that waits would hold when the process ends.
    while os.read(0, 1):
        # In one piece: other threads print too.
        os.write(1, f"{_USED}{json.dumps(asdict(Used.here()))}\n".encode())


def wait_until_stopped() -> None:
    """Wait for the signal of `ServerProcess.stop`. Call in the main thread."""
    asked_to_stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked_to_stop.set())
    asked_to_stop.wait()
