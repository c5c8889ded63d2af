"""The methods PutTensor and GetTensor: the elements of sessions' tensors."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    aclosing,
    nullcontext,
)
from functools import partial
from typing import TypeAlias

import grpc

from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.limits import MAX_MESSAGE_BYTES
from gradwire_protocol.v1 import job_pb2
from gradwire_protocol.v1 import session_service_pb2 as pb2
from gradwire_server.api.call_scope import call_scope
from gradwire_server.api.call_state import CallState
from gradwire_server.api.call_stream import CallStream
from gradwire_server.api.direct_offer import DirectOffer
from gradwire_server.api.session_calls import SessionCalls
from gradwire_server.errors import JobError
from gradwire_server.scheduling.device_worker import TenantHandle
from gradwire_server.sessions.direct_transfer import TensorReceiver, TensorSender
from gradwire_server.sessions.incoming import IncomingTensor
from gradwire_server.sessions.outgoing import OutgoingTensor
from gradwire_server.sessions.session import Session
from gradwire_server.sessions.tensor_headers import contents_of
from gradwire_server.sessions.tensors import KeptTensor
from gradwire_server.sessions.windows import WINDOW_BYTES

Context: TypeAlias = grpc.aio.ServicerContext[bytes, bytes]


class TensorServicer(SessionCalls):
    """Handlers of both methods."""

    async def put_tensor(self, _: AsyncIterator[bytes], context: Context) -> None:
        """Serve PutTensor: a tensor's header, then its elements."""

        async def serve(call: CallState) -> None:
            async with aclosing(CallStream(self._idle_s, call, context)) as stream:
                first = await stream.read_first(pb2.PutTensorRequest, "a header first")
                if first.WhichOneof("message") != "header":
                    raise _unexpected(first, "a header first")
                header = first.header
                used = self._sessions.used(
                    header.session, call.tenant, "header.session"
                )
                with self._memory(call), used as session:
                    call.session = session.id
                    async with session.puts.one(header) as made:
                        session.require_open()
                        if not made:
                            left_s = context.time_remaining()
                            await self._put(call, stream, session, first, left_s)
                        elif not first.HasField("direct"):
                            await _skip(stream, call)
                    answer = pb2.PutTensorResponse(used_bytes=session.used_bytes)
                await stream.write(answer.SerializeToString())
                if made and first.HasField("direct"):
                    await _skip(stream, call)

        await call_scope(self._service, "PutTensor", context, serve)

    async def _put(
        self,
        call: CallState,
        stream: CallStream,
        session: Session,
        request: pb2.PutTensorRequest,
        left_s: float | None,
    ) -> None:
        """Receive a tensor's elements, or find those of an equal one, and keep it."""
        header, worker = request.header, self._worker(call, session)
        chunks, first = _chunks(stream, call), None
        shared: AbstractAsyncContextManager[KeptTensor | None] = nullcontext()
        contents, asks = contents_of(session, header), False
        if contents is not None:
            if not request.HasField("direct"):
                first = await anext(chunks, None)
                asks = first is None
            if asks:  # whether the client has to send the elements
                wait_s = math.inf if left_s is None else left_s / 2
                shared = session.shared.asked(contents, session, wait_s)
            else:
                shared = session.shared.putting(contents, session)
        async with (
            shared as source,
            self._on_device(call, session),
            IncomingTensor(session, header, worker, source) as tensor,
        ):
            session.require_open()
            if request.HasField("direct"):
                await self._receive(call, stream, request.direct, tensor, worker)
            if first is not None:
                await tensor.take(first)
            async for chunk in chunks:
                await tensor.take(chunk)
            if not tensor.is_complete and not asks:
                await stream.await_cancellation()
            await tensor.finish()
            # The elements of a state may be on their way to a client.
            turns = session.turns
            async with turns.alone() if header.state else turns.shared():
                session.require_open()
                tensor.keep()

    async def _receive(
        self,
        call: CallState,
        stream: CallStream,
        offered: job_pb2.DirectOffer,
        tensor: IncomingTensor,
        worker: TenantHandle,
    ) -> None:
        """Answer a client's offer, and receive the elements if it takes the server's.

        Otherwise they are the next requests of the call.
        """
        wanted = offered.connections > 0 and not tensor.is_complete
        with DirectOffer(self._service.data, int(wanted)) as offer:
            answer = pb2.PutTensorResponse(accepted=True, direct=offer.access)
            await stream.write(answer.SerializeToString())
            connections = await offer.taken(
                stream, "the next chunk, the half-close, or direct connections"
            )
            if connections is not None:
                call.transport = "direct"
                await stream.serve_transfer(
                    TensorReceiver(
                        tensor,
                        connections[0].up,
                        partial(worker.submit_then, tensor),
                        call.progress,
                    )
                )
                offer.succeeded()

    async def get_tensor(self, _: AsyncIterator[bytes], context: Context) -> None:
        """Serve GetTensor: the elements of a tensor."""

        async def serve(call: CallState) -> None:
            async with aclosing(CallStream(self._idle_s, call, context)) as stream:
                request = await stream.read_request(pb2.GetTensorRequest)
                memory = self._memory(call, while_draining=True)
                with memory, self._used(call, request.session) as session:
                    tensor = session.tensor(request.tensor, "tensor")
                    # Jobs add to a gradient.
                    turns = session.turns
                    turn = turns.alone() if tensor.gradient else turns.shared()
                    async with turn:
                        session.require_open()
                        tensor = session.tensor(request.tensor, "tensor")
                        with session.using(tensor):
                            await self._send(call, stream, session, tensor, request)

        await call_scope(
            self._service, "GetTensor", context, serve, while_draining=True
        )

    async def _send(
        self,
        call: CallState,
        stream: CallStream,
        session: Session,
        tensor: KeptTensor,
        request: pb2.GetTensorRequest,
    ) -> None:
        """Send a tensor's elements, where the client wants them."""
        outgoing = OutgoingTensor(tensor, request, session.memory.on_device)
        wanted = request.direct.connections > 0 and outgoing.size > 0
        async with self._on_device(call, session) as do:
            with DirectOffer(self._service.data, int(wanted)) as offer:
                answer = pb2.GetTensorResponse(
                    header=outgoing.header, direct=offer.access
                )
                await stream.write(answer.SerializeToString())
                connections = await offer.taken(
                    stream, "the half-close, or direct connections"
                )
                if connections is not None:
                    call.transport = "direct"
                    worker = self._worker(call, session)
                    await stream.serve_transfer(
                        TensorSender(
                            outgoing,
                            connections[0].down,
                            partial(worker.submit_then, call),
                            call.progress,
                        )
                    )
                    offer.succeeded()
                    return
                if offer.access is not None:
                    await stream.read_half_close()
            async for chunk in outgoing.chunks(do):
                answer = pb2.GetTensorResponse(chunk=chunk)
                await stream.write(answer.SerializeToString())
                call.progress.bytes_sent += len(chunk.data)

    def _memory(
        self, call: CallState, *, while_draining: bool = False
    ) -> AbstractContextManager[None]:
        """Reserve host memory for a tensor's messages, and for copies to a device."""
        size_bytes = MAX_MESSAGE_BYTES
        if not self._service.backend.devices[0].in_host_memory:
            size_bytes += WINDOW_BYTES
        return self._service.admission.call(
            size_bytes, call.tenant, while_draining=while_draining
        )


async def _skip(stream: CallStream, call: CallState) -> None:
    """Read the requests of a put that was made, since clients may miss an early end."""
    async for _ in _chunks(stream, call):
        pass


async def _chunks(
    stream: CallStream, call: CallState
) -> AsyncIterator[pb2.TensorChunk]:
    """Yield a tensor's chunks, up to the half-close."""
    async for request in stream.requests(
        pb2.PutTensorRequest, "the next chunk, or the half-close"
    ):
        if request.WhichOneof("message") != "chunk":
            raise _unexpected(request, "a chunk")
        yield request.chunk
        call.progress.bytes_received += len(request.chunk.data)
        if request.chunk.data:  # chunks without elements are no progress
            stream.progressed()


def _unexpected(request: pb2.PutTensorRequest, expected: str) -> JobError:
    came = request.WhichOneof("message") or "nothing known"
    return JobError(
        Reason.MESSAGE_UNEXPECTED, f"a message with {came} came: expected {expected}"
    )
