"""The simplest grpcio solution: a unary call with ``bytes`` fields.

Uses generated message classes and the sync server, without a limit on message size;
all other options are defaults. As a script, this module is the server.
"""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np

from bench.contenders.grpc_server import UNLIMITED, serve
from bench.contenders.interface import ArrayContender, Arrays
from bench.contenders.messages import message_classes
from bench.contenders.server_process import ServerProcess
from bench.work import Array, copied, products

_SERVICE, _METHOD = "bench.unary.Gradients", "Compute"
_Request, _Reply = message_classes(
    "bench.unary",
    {
        "Request": {
            "m": ("int64", 1),
            "n": ("int64", 2),
            "k": ("int64", 3),
            "x": ("bytes", 4),
            "w": ("bytes", 5),
            "dy": ("bytes", 6),
        },
        "Reply": {"y": ("bytes", 1), "dx": ("bytes", 2), "dw": ("bytes", 3)},
    },
)


def _array(data: bytes, *shape: int) -> Array:
    return np.frombuffer(data, np.float32).reshape(shape)


class GrpcioUnary(ArrayContender):
    """One client, one connection, one call after the other."""

    def __init__(self) -> None:
        self._channel: grpc.Channel | None = None

    def start(self) -> None:
        self.server = ServerProcess.of_module(__name__)
        self._channel = grpc.insecure_channel(self.server.address, options=UNLIMITED)
        self._call = self._channel.unary_unary(
            f"/{_SERVICE}/{_METHOD}",
            request_serializer=_Request.SerializeToString,
            response_deserializer=_Reply.FromString,
        )

    def gradients(self, x: Array, w: Array, dy: Array, out: Arrays | None) -> Arrays:
        (m, n), k = x.shape, w.shape[1]
        reply = self._call(
            _Request(m=m, n=n, k=k, x=x.tobytes(), w=w.tobytes(), dy=dy.tobytes())
        )
        results = (
            _array(reply.y, m, k),
            _array(reply.dx, m, n),
            _array(reply.dw, n, k),
        )
        return results if out is None else copied(results, out)

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
        if self.server is not None:
            self.server.stop()


create = GrpcioUnary


def _compute(request: Any, _: grpc.ServicerContext) -> Any:
    m, n, k = request.m, request.n, request.k
    y, dx, dw = products(
        _array(request.x, m, n), _array(request.w, n, k), _array(request.dy, m, k)
    )
    return _Reply(y=y.tobytes(), dx=dx.tobytes(), dw=dw.tobytes())


def _serve() -> None:
    handler = grpc.unary_unary_rpc_method_handler(
        _compute,
        request_deserializer=_Request.FromString,
        response_serializer=_Reply.SerializeToString,
    )
    serve(_SERVICE, _METHOD, handler, UNLIMITED)


if __name__ == "__main__":
    _serve()
