"""A bench module in a separate process with an address."""

from __future__ import annotations

import subprocess
import sys
from typing import Self


class Child:
    """``python -m MODULE ARGUMENTS``: prints its address when ready, and ends at
    the end of its standard input.

    Attributes:
        address: HOST:PORT or unix:PATH.
    """

    def __init__(self, module: str, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().strip()
        if not self.address:
            raise RuntimeError(f"{module} ended: status {self._process.wait()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()

    def stop(self, timeout_s: float = 30.0) -> str:
        """Stop the process, and return its output after the address."""
        out, _ = self._process.communicate(timeout=timeout_s)
        return out
