"""Processes of servers and commands that start at once.

Most of what such a process costs is to import what it needs: half a second of a
processor for a server, nearly one for a command. `start` forks it from a process that
has imported that once, and has done nothing else: it has no threads of gRPC and no
event loop. From there on the process is like any other: it has its own arguments,
variables, directory and standard files, and ends as the interpreter ends.

What is about the start itself (what is imported, variables that libraries read when
they are imported, the encoding of the standard files) needs a process of its own.
`possible` says whether the variables are such that a forked process may stand for one.

Run as a script, this module is the process that forks.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

_ROOT = str(Path(__file__).parents[2])
_MESSAGE_BYTES = 1 << 18
# Read where they are used, or by nobody here.
_READ_LATE = ("GRADWIRE_", "PYTEST_", "COLUMNS", "TERM", "TMPDIR")


class ForkedProcess:
    """What `subprocess.Popen` is for a process that somebody else has started."""

    def __init__(self, pid: int, pipes: Sequence[IO[bytes] | None]) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.stdin, self.stdout, self.stderr = pipes
        self._ended = os.pidfd_open(pid)

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            readable = select.poll()
            readable.register(self._ended, select.POLLIN)
            if not readable.poll(None if timeout is None else timeout * 1000):
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            with _lock:
                if self.returncode is None:
                    self.returncode = _ask({"status of": self.pid})
                    os.close(self._ended)
        return self.returncode

    def send_signal(self, signum: int) -> None:
        # Until its status is asked for, nobody else has its number.
        if self.poll() is None:
            os.kill(self.pid, signum)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


_lock = threading.RLock()
_forks: tuple[int, socket.socket, dict[str, str]] | None = None


def _early(env: Mapping[str, str]) -> dict[str, str]:
    return {k: v for k, v in env.items() if not k.startswith(_READ_LATE)}


def possible(env: Mapping[str, str]) -> bool:
    """Whether a process with these variables may be a forked one."""
    # Coverage measures processes from their start on.
    if not hasattr(os, "pidfd_open") or any(k.startswith("COV") for k in env):
        return False
    with _lock:
        return _early(env) == _early(_connection()[1])


def start(
    entry: str,
    arguments: Sequence[str],
    env: Mapping[str, str],
    *,
    imports: Sequence[str],
    stdin: int,
    stdout: int,
    stderr: int,
) -> int:
    """Fork a process, and give its number.

    Args:
        entry: The function that it runs, as "module:function"; what it returns is the
            status that the process ends with.
        arguments: The arguments of its command line, without its name.
        env: Its variables.
        imports: Modules that have been imported when it begins.
        stdin: Its standard input, as a file descriptor; so `stdout` and `stderr`.
    """
    with _lock:
        return _ask(
            {
                "entry": entry,
                "arguments": list(arguments),
                "env": dict(env),
                "imports": list(imports),
                "directory": str(Path.cwd()),
            },
            stdin,
            stdout,
            stderr,
        )


def _connection() -> tuple[socket.socket, dict[str, str]]:
    global _forks  # noqa: PLW0603
    if _forks is None or _forks[0] != os.getpid():
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        env = dict(os.environ)
        # It ends when the other end of its socket is closed.
        process = subprocess.Popen(
            [sys.executable, __file__, str(there.fileno())],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[there.fileno()],
        )
        there.close()
        _forks = os.getpid(), here, env

        def end(owner: int = os.getpid()) -> None:
            if os.getpid() == owner:
                # Close alone would not do: forks of this process may have it too.
                here.shutdown(socket.SHUT_RDWR)
                here.close()
                process.wait()

        atexit.register(end)
    return _forks[1:]


def _ask(request: dict[str, Any], *files: int) -> int:
    connection, _ = _connection()
    socket.send_fds(connection, [json.dumps(request).encode()], list(files))
    return int(connection.recv(64))


def _serve(connection: socket.socket) -> Callable[[], int | None] | None:
    """Answer requests to the end; in a forked process, what it shall run."""
    while True:
        message, files, _, _ = socket.recv_fds(connection, _MESSAGE_BYTES, 3)
        if not message:
            return None
        request = json.loads(message)
        if "status of" in request:
            _, status = os.waitpid(request["status of"], 0)
            answer = os.waitstatus_to_exitcode(status)
        else:
            for name in request["imports"]:
                importlib.import_module(name)
            module, _, function = request["entry"].partition(":")
            entry = getattr(importlib.import_module(module), function)
            if (answer := os.fork()) == 0:
                connection.close()
                _become(request, files)
                return entry
            for file in files:
                os.close(file)
        connection.send(str(answer).encode())


def _become(request: dict[str, Any], files: Sequence[int]) -> None:
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["directory"])
    tempfile.tempdir = None  # as its own variables say
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [request["entry"], *request["arguments"]]


if __name__ == "__main__":
    sys.path[0] = _ROOT
    # Ctrl-C is for those who were forked; their tests end this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The threads of BLAS, which it ends before each fork.
    warnings.filterwarnings("ignore", message=".*multi-threaded", category=Warning)
    run = _serve(socket.socket(fileno=int(sys.argv[1])))
    if run is not None:
        warnings.resetwarnings()
        sys.exit(run())
