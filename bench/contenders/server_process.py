"""The server of a contender, in a process of its own."""

from __future__ import annotations

import re
import subprocess
import threading
from typing import Self

_ADDRESS = re.compile(r"127\.0\.0\.1:\d+")


class ServerProcess:
    """A command that prints a line with its address when it is ready."""

    def __init__(self, process: subprocess.Popen[str], address: str) -> None:
        self._process = process
        self.address = address

    @property
    def pid(self) -> int:
        return self._process.pid

    @classmethod
    def start(cls, command: list[str], timeout_s: float = 30.0) -> Self:
        """Run `command` until `stop`; it inherits this process's environment.

        Raises:
            RuntimeError: It ended, or named no address within the timeout.
        """
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        too_late = threading.Timer(timeout_s, process.kill)
        too_late.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if found := _ADDRESS.search(line):
                    return cls(process, found[0])
        finally:
            too_late.cancel()
        raise RuntimeError(f"no address from {command}: exit status {process.wait()}")

    def stop(self) -> None:
        """Ask it to end, and make it after ten seconds."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
