"""The server of a contender, in a separate process."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Self

HOST = os.environ.get("BENCH_SERVER_HOST", "127.0.0.1")
"""Listen address of TCP contenders."""

_BEFORE = shlex.split(os.environ.get("BENCH_SERVER_COMMAND", ""))
"""Prefix of a server's command, such as ``ip netns exec NAME``."""

_ADDRESS = re.compile(r"(?:serves on|ready at) (\S+)")


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
            [*_BEFORE, *command], stdout=subprocess.PIPE, text=True, pass_fds=keep
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

    def stop(self) -> None:
        """Ask the process to end; kill it after ten seconds."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


def say_ready(address: str) -> None:
    """Print the line of a ready server."""
    print(f"ready at {address}", flush=True)


def wait_until_stopped() -> None:
    """Wait for the signal of `ServerProcess.stop`. Call in the main thread."""
    asked_to_stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked_to_stop.set())
    asked_to_stop.wait()
