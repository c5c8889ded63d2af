"""The commands, run as a user runs them: in a process of their own.

Those that run to their end are forked from a process that has imported the command
line; a process of a test's own (`started`, `COMMAND`) imports it itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

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
    command, variables = [*COMMAND, *map(str, arguments)], environment(env)
    if not options and BACKEND != "cupy" and forking.possible(variables):
        return _forked(command, variables)
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=variables,
        check=False,
        **options,
    )


def _forked(
    command: list[str], env: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    with (
        Path(os.devnull).open() as stdin,
        TemporaryFile() as out,
        TemporaryFile() as err,
    ):
        pid = forking.start(
            "gradwire_cli:main",
            command[len(COMMAND) :],
            env,
            imports=("gradwire_cli.app",),
            stdin=stdin.fileno(),
            stdout=out.fileno(),
            stderr=err.fileno(),
        )
        process = forking.ForkedProcess(pid, (None, None, None))
        try:
            status = process.wait(TIMEOUT_S)
        finally:
            process.kill()
            process.wait()
        said = []
        for file in out, err:
            file.seek(0)
            said.append(file.read().decode())
    return subprocess.CompletedProcess(command, status, *said)


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
    process = subprocess.Popen(
        [*command, *map(str, arguments)],
        text=True,
        env=environment(env),
        **({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options),
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


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
