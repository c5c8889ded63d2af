"""What one writes in an afternoon: a unary grpcio call with ``bytes`` fields.

Generated message classes (made at run time from the same description that
protoc would compile), the sync server, no limit on the size of a message,
every other option at its default. Run as a script, this is the server.
"""

from __future__ import annotations

import signal
import sys
import threading
from concurrent import futures
from typing import Any

import grpc
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from bench.contenders.server_process import ServerProcess
from bench.work import Array

_METHOD = "/bench.Gradients/Compute"
_UNLIMITED = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
]


def _messages() -> tuple[type[Any], type[Any]]:
    """Classes of: message Request { int64 m = 1; int64 n = 2; int64 k = 3;
    bytes x = 4; bytes w = 5; bytes dy = 6; } and
    message Reply { bytes y = 1; bytes dx = 2; bytes dw = 3; }.
    """
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="bench_gradients.proto", package="bench", syntax="proto3"
    )
    for name, fields in {
        "Request": ["m", "n", "k", "x", "w", "dy"],
        "Reply": ["y", "dx", "dw"],
    }.items():
        message = file.message_type.add(name=name)
        for number, field in enumerate(fields, 1):
            message.field.add(
                name=field,
                number=number,
                label=kinds.LABEL_OPTIONAL,
                type=kinds.TYPE_INT64 if field in "mnk" else kinds.TYPE_BYTES,
            )
    descriptor_pool.Default().Add(file)
    found = descriptor_pool.Default().FindFileByName("bench_gradients.proto")
    request, reply = (
        message_factory.GetMessageClass(found.message_types_by_name[name])
        for name in ("Request", "Reply")
    )
    return request, reply


_Request, _Reply = _messages()


def _array(data: bytes, *shape: int) -> Array:
    return np.frombuffer(data, np.float32).reshape(shape)


class GrpcioUnary:
    """One client, one connection, one call after the other."""

    server_pid: int | None = None

    def __init__(self) -> None:
        self._server: ServerProcess | None = None
        self._channel: grpc.Channel | None = None

    def start(self) -> None:
        self._server = ServerProcess.start([sys.executable, "-m", __name__])
        self.server_pid = self._server.pid
        self._channel = grpc.insecure_channel(self._server.address, options=_UNLIMITED)
        self._call = self._channel.unary_unary(
            _METHOD,
            request_serializer=_Request.SerializeToString,
            response_deserializer=_Reply.FromString,
        )

    def gradients(self, x: Array, w: Array, dy: Array) -> tuple[Array, Array, Array]:
        (m, n), k = x.shape, w.shape[1]
        reply = self._call(
            _Request(m=m, n=n, k=k, x=x.tobytes(), w=w.tobytes(), dy=dy.tobytes())
        )
        return _array(reply.y, m, k), _array(reply.dx, m, n), _array(reply.dw, n, k)

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
        if self._server is not None:
            self._server.stop()


create = GrpcioUnary


def _compute(request: Any, _: grpc.ServicerContext) -> Any:
    m, n, k = request.m, request.n, request.k
    x = _array(request.x, m, n)
    w = _array(request.w, n, k)
    dy = _array(request.dy, m, k)
    return _Reply(y=(x @ w).tobytes(), dx=(dy @ w.T).tobytes(), dw=(x.T @ dy).tobytes())


def _serve() -> None:
    server = grpc.server(futures.ThreadPoolExecutor(), options=_UNLIMITED)
    _, service, method = _METHOD.split("/")
    handler = grpc.unary_unary_rpc_method_handler(
        _compute,
        request_deserializer=_Request.FromString,
        response_serializer=_Reply.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, {method: handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    asked_to_stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked_to_stop.set())
    server.start()
    print(f"ready at 127.0.0.1:{port}", flush=True)
    asked_to_stop.wait()
    server.stop(grace=None)


if __name__ == "__main__":
    _serve()
