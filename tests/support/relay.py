"""A relay of gRPC calls that sees each message of a stream and can hold it back.

It stands between the SDK and a server, as a proxy does that understands HTTP/2, and
keeps its own account of what a client sends by the contract's generated classes.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from gradwire.v1 import gradient_service_pb2 as service_pb2
from gradwire.v1 import job_pb2, matrix_pb2

ITEM_BYTES = {1: 2, 2: 2, 3: 4, 4: 8}
"""Size of an element, by `Dtype`."""
WAIT_S = 20.0


class Call:
    """What was seen of one ComputeStream call."""

    def __init__(self) -> None:
        self.job = job_pb2.Job()
        self.accepted: job_pb2.Accepted | None = None
        """Accepted, once the client may have it."""
        self.early_bytes = 0
        """Bytes of elements that came before that."""
        self.begun = 0
        """Row blocks of which an element came."""
        self.received = 0
        """Row blocks whose Y and dX the client may have, in full."""
        self.most_outstanding = 0
        self.ended = False
        self.changed = threading.Condition()
        self._results: dict[int, int] = {}

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until something that was sent or received makes this true."""
        with self.changed:
            if not self.changed.wait_for(condition, WAIT_S):
                raise AssertionError(f"not within {WAIT_S} s: {what}")

    def stays_for(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Whether this is true all the time."""
        with self.changed:
            return not self.changed.wait_for(lambda: not condition(), seconds)

    def request(self, message: bytes) -> None:
        asked = service_pb2.ComputeStreamRequest.FromString(message)
        with self.changed:
            kind = asked.WhichOneof("message")
            if kind == "job":
                self.job = asked.job
            elif kind == "end":
                self.ended = True
            else:
                self._chunk(asked.chunk)
            self.changed.notify_all()

    def response(self, answer: service_pb2.ComputeStreamResponse) -> None:
        with self.changed:
            if answer.HasField("accepted"):
                self.accepted = answer.accepted
                # Accepted may be about rows that were sent before it.
                self._count(self.begun)
            elif answer.HasField("chunk"):
                self._result(answer.chunk)
            self.changed.notify_all()

    def _chunk(self, chunk: matrix_pb2.Chunk) -> None:
        if self.accepted is None:
            self.early_bytes += len(chunk.data)
        columns = {1: self.job.n, 3: self.job.k}.get(chunk.matrix)
        if columns and self.accepted is not None:
            last = chunk.index + len(chunk.data) // ITEM_BYTES[self.job.dtype] - 1
            self._count(last // columns // self.accepted.block_rows + 1)

    def _count(self, begun: int) -> None:
        self.begun = max(self.begun, begun)
        first = 0
        if self.job.HasField("resume"):
            first = self.job.resume.results_from_row // self._block_rows
        outstanding = self.begun - max(self.received, first)
        if self._wanted:
            self.most_outstanding = max(self.most_outstanding, outstanding)

    def _result(self, chunk: matrix_pb2.Chunk) -> None:
        if chunk.matrix in self._wanted:
            itemsize = ITEM_BYTES[self.job.dtype]
            last = chunk.index + len(chunk.data) // itemsize
            self._results[chunk.matrix] = last
            rows = min(
                self._results.get(matrix, 0) // columns
                for matrix, columns in self._wanted.items()
            )
            self.received = rows // self._block_rows

    @property
    def _block_rows(self) -> int:
        assert self.accepted is not None
        return self.accepted.block_rows

    @property
    def _wanted(self) -> dict[int, int]:
        """Columns of the results of row blocks, by matrix."""
        of = {4: ("y", self.job.k), 5: ("dx", self.job.n)}
        return {m: c for m, (name, c) in of.items() if c and self.job.HasField(name)}


Gate = Callable[[Call, service_pb2.ComputeStreamResponse], None]
"""Called before a message goes to the client; it may wait, or raise to cut the call."""


class CutError(Exception):
    """Ends the call as if the server had died."""


class Relay(grpc.GenericRpcHandler):  # type: ignore[misc]  # not in its stubs
    """Passes every call on.

    Attributes:
        address: Where it listens.
        calls: The ComputeStream calls so far.
        gate: Called before each message of such a call goes to the client.
    """

    def __init__(self, to: str) -> None:
        self.calls: list[Call] = []
        self.gate: Gate = lambda call, answer: None
        options = (("grpc.max_receive_message_length", -1),)
        self._channel = grpc.insecure_channel(to, options=options)
        self._server = grpc.server(
            ThreadPoolExecutor(32), handlers=(self,), options=options
        )
        port = self._server.add_insecure_port("127.0.0.1:0")
        self.address = f"127.0.0.1:{port}"
        self._server.start()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(0).wait()
        self._channel.close()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        method, streamed = details.method, details.method.endswith("/ComputeStream")

        def handle(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
            call = Call() if streamed else None
            if call is not None:
                self.calls.append(call)
            upstream = self._channel.stream_stream(method)(
                _seen(requests, call), metadata=details.invocation_metadata
            )
            context.add_callback(upstream.cancel)
            try:
                for message in upstream:
                    if call is not None:
                        answer = service_pb2.ComputeStreamResponse.FromString(message)
                        self.gate(call, answer)
                        call.response(answer)
                    yield message
            except CutError:
                upstream.cancel()
                context.abort(grpc.StatusCode.UNAVAILABLE, "cut by the relay")
            except grpc.RpcError as error:
                with contextlib.suppress(ValueError):  # the client has left
                    context.set_trailing_metadata(error.trailing_metadata() or ())
                context.abort(error.code(), error.details() or "")

        return grpc.stream_stream_rpc_method_handler(handle)


def _seen(requests: Iterator[bytes], call: Call | None) -> Iterator[bytes]:
    with contextlib.suppress(grpc.RpcError):  # the client has left
        for message in requests:
            if call is not None:
                call.request(message)
            yield message
