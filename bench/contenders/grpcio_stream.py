"""Plain streaming grpcio: chunks of 1 MiB in generated classes, both ways.

The server reads all operands into arrays, computes, and streams the results back: the
usual solution for messages too large for a unary call. All options are defaults. As a
script, this module is the server.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import grpc
import numpy as np

from bench.contenders.grpc_server import serve
from bench.contenders.interface import ArrayContender, Arrays
from bench.contenders.messages import message_classes
from bench.contenders.server_process import ServerProcess
from bench.work import Array, empty_results, products

_SERVICE, _METHOD = "bench.stream.Gradients", "Compute"
_CHUNK = 1 << 20
(_Chunk,) = message_classes(
    "bench.stream",
    {
        "Chunk": {
            # Only in the first chunk of a request, without data.
            "m": ("int64", 1),
            "n": ("int64", 2),
            "k": ("int64", 3),
            # Bytes of the matrices, one after the other.
            "data": ("bytes", 4),
        }
    },
)


def _chunks(arrays: Iterable[Array]) -> Iterator[Any]:
    for array in arrays:
        view = memoryview(array).cast("B")
        for first in range(0, len(view), _CHUNK):
            yield _Chunk(data=bytes(view[first : first + _CHUNK]))


def _take(chunks: Iterator[Any], arrays: Iterable[Array]) -> None:
    """Fill arrays from chunks; each chunk belongs to one array, as in `_chunks`."""
    for array in arrays:
        view = memoryview(array).cast("B")
        taken = 0
        while taken < len(view):
            data = next(chunks).data
            view[taken : taken + len(data)] = data
            taken += len(data)


class GrpcioStream(ArrayContender):
    """One client, one connection, one call after the other."""

    def __init__(self) -> None:
        self._channel: grpc.Channel | None = None

    def start(self) -> None:
        self.server = ServerProcess.of_module(__name__)
        self._channel = grpc.insecure_channel(self.server.address)
        self._call = self._channel.stream_stream(
            f"/{_SERVICE}/{_METHOD}",
            request_serializer=_Chunk.SerializeToString,
            response_deserializer=_Chunk.FromString,
        )

    def gradients(self, x: Array, w: Array, dy: Array, out: Arrays | None) -> Arrays:
        def requests() -> Iterator[Any]:
            yield _Chunk(m=x.shape[0], n=w.shape[0], k=w.shape[1])
            yield from _chunks((x, w, dy))

        results = out or empty_results(x, w, dy)
        _take(self._call(requests()), results)
        return results

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
        if self.server is not None:
            self.server.stop()


create = GrpcioStream


def _compute(requests: Iterator[Any], _: grpc.ServicerContext) -> Iterator[Any]:
    first = next(requests)
    m, n, k = first.m, first.n, first.k
    x, w, dy = (np.empty(shape, np.float32) for shape in ((m, n), (n, k), (m, k)))
    _take(requests, (x, w, dy))
    yield from _chunks(products(x, w, dy))


def _serve() -> None:
    handler = grpc.stream_stream_rpc_method_handler(
        _compute,
        request_deserializer=_Chunk.FromString,
        response_serializer=_Chunk.SerializeToString,
    )
    serve(_SERVICE, _METHOD, handler)


if __name__ == "__main__":
    _serve()
