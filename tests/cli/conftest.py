"""The commands, run as a user runs them: in a process of their own.

They are forked from a process that has imported the command line, unless a test gives
them more than arguments, variables and files. What starts `COMMAND` imports it itself:
that takes more than a second of a processor."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import IO, Any

import pytest

from gradwire_cli.app import run
from gradwire_server import Server, Settings
from gradwire_server.backends.base import Backend
from tests.support import forking
from tests.support.serving import BACKEND

TIMEOUT_S = 60.0
COMMAND = (sys.executable, "-m", "gradwire_cli")


def environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    """This process's variables without gradwire's own, but for the backend."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("GRADWIRE_")}
    kept.pop("COLUMNS", None)
    return kept | {"GRADWIRE_BACKEND": BACKEND} | (extra or {})


def gradwire(
    *arguments: object, env: dict[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    with started(*arguments, env=env, **options) as process:
        said = process.communicate(timeout=TIMEOUT_S)
    return subprocess.CompletedProcess(process.args, process.returncode, *said)


def sentence(done: subprocess.CompletedProcess[str]) -> str:
    """What a command that failed said, which must be one sentence and no more."""
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("gradwire: ")
    return done.stderr.removeprefix("gradwire: ").strip()


@contextlib.contextmanager
def started(
    *arguments: object,
    env: dict[str, str] | None = None,
    command: Sequence[str] = COMMAND,
    **options: Any,
) -> Iterator[subprocess.Popen[str]]:
    """A command that runs meanwhile, and is killed if it still does after."""
    whole, variables = [*command, *map(str, arguments)], environment(env)
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    process: Any
    if (
        command == COMMAND
        and options.keys() == {"stdout", "stderr"}
        and BACKEND != "cupy"  # CUDA is not to be forked
        and forking.possible(variables)
    ):
        process = ForkedCommand(whole, variables, **options)
    else:
        process = subprocess.Popen(whole, text=True, env=variables, **options)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


class ForkedCommand(forking.ForkedProcess):
    """What `subprocess.Popen` is for a command, forked.

    Args:
        args: Its whole command line.
        env: Its variables.
        stdout: `subprocess.PIPE`, or a file or descriptor; so `stderr`.
    """

    def __init__(
        self, args: Sequence[str], env: dict[str, str], stdout: Any, stderr: Any
    ) -> None:
        self.args = args
        pipes: list[IO[str] | None] = []
        with contextlib.ExitStack() as opened:
            given = [opened.enter_context(Path(os.devnull).open()).fileno()]
            for each in (stdout, stderr):
                if each == subprocess.PIPE:
                    reads, writes = os.pipe()
                    opened.callback(os.close, writes)
                    pipes.append(os.fdopen(reads, encoding="utf-8"))
                    given.append(writes)
                else:
                    pipes.append(None)
                    given.append(each if isinstance(each, int) else each.fileno())
            pid = forking.start(
                "gradwire_cli:main",
                args[len(COMMAND) :],
                env,
                imports=("gradwire_cli.app",),
                stdin=given[0],
                stdout=given[1],
                stderr=given[2],
            )
        super().__init__(pid, (None, *pipes))

    def communicate(self, timeout: float | None = None) -> tuple[str | None, ...]:
        """Read what is still to read, and wait for the end."""
        with futures.ThreadPoolExecutor(2) as pool:
            pipes = (self.stdout, self.stderr)
            said = [pipe and pool.submit(_read_and_close, pipe) for pipe in pipes]
            try:
                self.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
            return tuple(each and each.result() for each in said)


def _read_and_close(pipe: IO[str]) -> str:
    if pipe.closed:
        return ""
    with pipe:
        return pipe.read()


def ended_by(process: subprocess.Popen[str], signum: signal.Signals) -> tuple[str, str]:
    """Send a signal, and wait for the end; what was still to read."""
    process.send_signal(signum)
    return process.communicate(timeout=TIMEOUT_S)


@contextlib.contextmanager
def serving_with(backend: Backend, **settings: Any) -> Iterator[str]:
    """The address of a real server that computes with a backend of the test's."""
    loop = asyncio.new_event_loop()
    server = Server(Settings(listen=("127.0.0.1:0",), **settings), backend)
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result(TIMEOUT_S)
        yield server.addresses[0]
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(TIMEOUT_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def refusal_here(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command says that fails in this process, and its status before."""
    status = run([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("gradwire: ")
    assert err.count("\n") == 1, err
    return f"{status} {err}"


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address that nobody listens on, and nobody will meanwhile."""
    import socket

    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"
