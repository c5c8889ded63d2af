"""The grpcio server of the grpcio contenders: sync, with default options."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent import futures

import grpc

from bench.contenders.server_process import HOST, say_ready, wait_until_stopped

UNLIMITED = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
]
"""Channel and server options without a limit on message size."""


def serve(
    service: str,
    method: str,
    handler: grpc.RpcMethodHandler,
    options: Sequence[tuple[str, int]] = (),
) -> None:
    """Serve one method until this process is stopped."""
    server = grpc.server(futures.ThreadPoolExecutor(), options=options)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, {method: handler}),)
    )
    port = server.add_insecure_port(f"{HOST}:0")
    server.start()
    say_ready(f"{HOST}:{port}")
    wait_until_stopped()
    server.stop(grace=None)
