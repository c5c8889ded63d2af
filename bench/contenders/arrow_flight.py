"""Arrow Flight: one DoExchange, each matrix in record batches of float32.

A sent batch uses the array's own memory. A received batch is copied once, because
Flight's buffers are seldom aligned. Batches of a few MiB are at least as fast as one
per matrix, and take less memory. Where nothing is computed, both directions run at
once, in a thread each at both ends. As a script, this module is the server.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import flight

from bench.contenders.duplex import meanwhile
from bench.contenders.interface import ArrayContender, Arrays
from bench.contenders.server_process import HOST, ServerProcess, say_ready
from bench.work import COMPUTES, Array, empty_results, products, unset_results

_SIZES = struct.Struct("<3q")
_SCHEMA = pa.schema([pa.field("elements", pa.float32(), nullable=False)])
_BATCH_ELEMENTS = (4 << 20) // 4
_OPTIONS = flight.FlightCallOptions(
    write_options=pa.ipc.IpcWriteOptions(compression=None)
)


def _write(writer: Any, arrays: Iterable[Array]) -> None:
    for array in arrays:
        flat = array.reshape(-1)
        for first in range(0, flat.size, _BATCH_ELEMENTS):
            part = pa.array(flat[first : first + _BATCH_ELEMENTS])
            writer.write_batch(pa.record_batch([part], schema=_SCHEMA))


def _send(writer: Any, operands: Arrays) -> None:
    _write(writer, operands)
    writer.done_writing()


def _take(reader: Any, arrays: Iterable[Array]) -> None:
    """Fill arrays from batches; each batch belongs to one array, as in `_write`."""
    for array in arrays:
        flat, taken = array.reshape(-1), 0
        while taken < flat.size:
            elements = reader.read_chunk().data.column(0).to_numpy()
            flat[taken : taken + elements.size] = elements
            taken += elements.size


class ArrowFlight(ArrayContender):
    """One client, one connection, one call after the other."""

    def __init__(self) -> None:
        self._client: flight.FlightClient | None = None

    def start(self) -> None:
        self.server = ServerProcess.of_module(__name__)
        self._client = flight.connect(f"grpc://{self.server.address}")

    def gradients(self, x: Array, w: Array, dy: Array, out: Arrays | None) -> Arrays:
        assert self._client is not None
        (m, n), k = x.shape, w.shape[1]
        sizes = flight.FlightDescriptor.for_command(_SIZES.pack(m, n, k))
        writer, reader = self._client.do_exchange(sizes, _OPTIONS)
        with writer:
            writer.begin(_SCHEMA)
            results = out or empty_results(x, w, dy)
            if COMPUTES:
                _send(writer, (x, w, dy))
                _take(reader, results)
            else:
                with meanwhile(lambda: _send(writer, (x, w, dy))):
                    _take(reader, results)
            return results

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
        if self.server is not None:
            self.server.stop()


create = ArrowFlight


class _Server(flight.FlightServerBase):  # type: ignore[misc]  # it has no types
    def do_exchange(self, _: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        m, n, k = _SIZES.unpack(descriptor.command)
        x, w, dy = (np.empty(s, np.float32) for s in ((m, n), (n, k), (m, k)))
        writer.begin(_SCHEMA)
        if COMPUTES:
            _take(reader, (x, w, dy))
            _write(writer, products(x, w, dy))
        else:
            with meanwhile(lambda: _write(writer, unset_results(m, n, k))):
                _take(reader, (x, w, dy))


if __name__ == "__main__":
    server = _Server(f"grpc://{HOST}:0")
    say_ready(f"{HOST}:{server.port}")
    server.serve()
