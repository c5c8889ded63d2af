"""gradwire: ``gradwire serve`` with default settings, and the SDK."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeAlias

import gradwire
from bench.contenders import gradwire_server
from bench.contenders.interface import ArrayContender, Arrays
from bench.contenders.server_process import HOST
from bench.work import COMPUTES, Array, Shape, copied
from gradwire._api.options import BlockRows

Transport: TypeAlias = Literal["grpc", "direct", "shm"]

CHECKED_FROM_BYTES = 8 << 20
"""From this size each way on, a job must have gone the way that was asked for. Smaller
ones may go over gRPC."""

_WAYS = {"tcp": "grpc", "unix": "grpc"}
"""A receipt's words for elements in messages of the call."""


class Gradwire(ArrayContender):
    """One client, one call after the other.

    Args:
        transport: How elements travel: in messages of the gRPC call, over connections
            beside it, or in shared memory.
        unix: Whether the server listens on a unix socket instead of TCP.
        tls: Whether the connections are encrypted.
        block_rows: The option of that name; None: the server's own row blocks.
    """

    def __init__(
        self,
        transport: Transport = "grpc",
        *,
        unix: bool = False,
        tls: bool = False,
        block_rows: BlockRows | None = None,
    ) -> None:
        self._transport, self._unix, self._tls = transport, unix, tls
        self._block_rows = block_rows
        self._folder = tempfile.TemporaryDirectory(prefix="gradwire-bench-")
        self._client: gradwire.Client | None = None

    def start(self) -> None:
        folder = Path(self._folder.name)
        flags: list[str] = []
        if self._unix:
            flags += ["--listen", f"unix:{folder / 'socket'}"]
        if self._transport == "shm":
            flags += ["--allow-shared-memory"]
        if self._tls:
            _make_certificates(folder)
            flags += ["--tls-cert", str(folder / "server.pem")]
            flags += ["--tls-key", str(folder / "server-key.pem")]
        self.server = gradwire_server.start("numpy" if COMPUTES else "idle", *flags)
        self._client = gradwire.connect(
            self.server.address,
            transport=self._transport,
            tls=gradwire.Tls(ca=folder / "ca.pem") if self._tls else None,
            block_rows=self._block_rows,
        )

    def check_way(self, shape: Shape) -> None:
        assert self._client is not None
        receipt = self._client.last_receipt
        if receipt is None or shape.bytes_each_way < CHECKED_FROM_BYTES:
            return
        if _WAYS.get(receipt.transport, receipt.transport) != self._transport:
            raise RuntimeError(
                f"the job went over {receipt.transport}, not {self._transport}"
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
        if not (self._transport == "shm" and reused):
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


def _make_certificates(folder: Path) -> None:
    command = [sys.executable, "-m", "gradwire_cli", "certs", str(folder)]
    command += ["--host", HOST]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
