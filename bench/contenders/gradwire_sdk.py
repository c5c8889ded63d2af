"""gradwire: ``gradwire serve`` with default settings, and the SDK."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import gradwire
from bench.contenders.interface import ArrayContender, Arrays
from bench.contenders.server_process import HOST, ServerProcess
from bench.work import Array, copied
from gradwire._api.options import BlockRows


class Gradwire(ArrayContender):
    """One client, one call after the other.

    Args:
        unix: Whether the server listens on a unix socket instead of TCP.
        shared: Whether elements stay in shared memory.
        block_rows: The option of that name; None: the server's own row blocks.
    """

    def __init__(
        self,
        *,
        unix: bool = False,
        shared: bool = False,
        block_rows: BlockRows | None = None,
    ) -> None:
        self._unix, self._shared = unix, shared
        self._block_rows = block_rows
        self._folder = tempfile.TemporaryDirectory(prefix="gradwire-bench-")
        self._server: ServerProcess | None = None
        self._client: gradwire.Client | None = None

    def start(self) -> None:
        path = Path(self._folder.name, "socket")
        command = [str(Path(sys.executable).with_name("gradwire")), "serve"]
        command += ["--listen", f"unix:{path}" if self._unix else f"{HOST}:0"]
        # A link of the bench is private, so plaintext is safe.
        command += ["--backend", "numpy", "--insecure"]
        if threads := os.environ.get("OPENBLAS_NUM_THREADS"):
            command += ["--cpu-threads", threads]
        if self._shared:
            command += ["--allow-shared-memory"]
        # The log line of every job would appear in the table.
        command += ["--log-level", "warning"]
        self._server = ServerProcess.start(command)
        self.server_pid = self._server.pid
        transport = "shm" if self._shared else "grpc"
        self._client = gradwire.connect(
            self._server.address, transport=transport, block_rows=self._block_rows
        )

    @property
    def address(self) -> str:
        """The server's address, once it has started."""
        assert self._server is not None
        return self._server.address

    def gradients(self, x: Array, w: Array, dy: Array, out: Arrays | None) -> Arrays:
        assert self._client is not None
        y, dx, dw = self._client.gradients(x, w, dy, out=out)
        return y, dx, dw

    def call(self, given: Arrays, *, reused: bool) -> Callable[[], Arrays]:
        if not (self._shared and reused):
            return super().call(given, reused=reused)
        assert self._client is not None
        x, w, dy = (self._client.empty(array.shape) for array in given)
        copied(given, into=(x, w, dy))
        (m, n), k = x.shape, w.shape[1]
        y, dx, dw = (self._client.empty(s) for s in ((m, k), (m, n), (n, k)))
        return lambda: self.gradients(x, w, dy, (y, dx, dw))

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
        if self._server is not None:
            self._server.stop()
        self._folder.cleanup()


create = Gradwire
