"""gradwire: ``gradwire serve`` with default settings, and the SDK."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import gradwire
from bench.contenders import gradwire_server
from bench.contenders.interface import ArrayContender, Arrays
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
        self._client: gradwire.Client | None = None

    def start(self) -> None:
        path = Path(self._folder.name, "socket")
        flags = ["--listen", f"unix:{path}"] if self._unix else []
        flags += ["--allow-shared-memory"] if self._shared else []
        self.server = gradwire_server.start("numpy", *flags)
        transport = "shm" if self._shared else "grpc"
        self._client = gradwire.connect(
            self.server.address, transport=transport, block_rows=self._block_rows
        )

    @property
    def address(self) -> str:
        """The server's address, once it has started."""
        assert self.server is not None
        return self.server.address

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
        if self.server is not None:
            self.server.stop()
        self._folder.cleanup()


create = Gradwire
