"""The methods of `gradwire.v1.GradientService`: decode, call, encode.

All of them are given and give bytes. A deserializer that raises would end
the call as UNKNOWN with the exception's text, so messages are parsed here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from gradwire.v1 import gradient_service_pb2 as pb2
from gradwire.wire import framing
from gradwire.wire.limits import MAX_MESSAGE_BYTES, SERVICE
from gradwire_server import info, unary
from gradwire_server.accounting import accounted
from gradwire_server.errors import malformed
from gradwire_server.service import Service
from gradwire_server.stream import Stream

Context: TypeAlias = grpc.aio.ServicerContext[bytes, bytes]
_Half: TypeAlias = Coroutine[Any, Any, None]


class GradientServicer:
    """The three methods.

    Args:
        service: What they call.
        backend_reason: Why the backend was chosen, for GetServerInfo.
    """

    def __init__(self, service: Service, backend_reason: str) -> None:
        self._service = service
        self._backend_reason = backend_reason

    def handler(self) -> grpc.GenericRpcHandler:
        """What a gRPC server is given."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Compute": grpc.unary_unary_rpc_method_handler(self.compute),
                "ComputeStream": grpc.stream_stream_rpc_method_handler(
                    self.compute_stream
                ),
                "GetServerInfo": grpc.unary_unary_rpc_method_handler(
                    self.get_server_info
                ),
            },
        )

    async def get_server_info(self, request: bytes, context: Context) -> bytes:
        """GetServerInfo; its request is empty, and what else it holds ignored."""
        del request, context
        return info.describe(self._service, self._backend_reason).SerializeToString()

    async def compute(self, request: bytes, context: Context) -> bytes:
        """Compute: a small job, whole."""
        async with accounted(self._service, "Compute", context) as call:
            try:
                message = pb2.ComputeRequest.FromString(request)
            except DecodeError:
                what = pb2.ComputeRequest.DESCRIPTOR.full_name
                raise malformed(f"the request is no {what}") from None
            spec = self._service.read_job(call, message.job)
            operands = unary.whole_operands(spec, message)
            size = unary.message_bytes(spec)
            results = await self._service.run(call, size, operands)
            return pb2.ComputeResponse(
                accepted=self._service.accepted(call),
                receipt=self._service.receipt(call),
                **{result.label: array.tobytes() for result, array in results.items()},
            ).SerializeToString()
        raise RuntimeError("a failed call is aborted")

    async def compute_stream(self, _: AsyncIterator[bytes], context: Context) -> None:
        """ComputeStream: a job of any size, block by block."""
        async with accounted(self._service, "ComputeStream", context) as call:
            stream = Stream(self._service, call, context)
            spec = self._service.read_job(call, await stream.read_header())
            message_bytes = 2 * (MAX_MESSAGE_BYTES + spec.max_block_bytes)
            async with self._service.streamed(
                call, message_bytes, stream.tell_queued
            ) as job:
                await stream.write(
                    framing.encode_accepted(self._service.accepted(call))
                )
                await _both(stream.receive(job), stream.send(job, spec))
                await stream.write(framing.encode_receipt(self._service.receipt(call)))


async def _both(
    one: Coroutine[Any, Any, None], other: Coroutine[Any, Any, None]
) -> None:
    """Waits for two halves of a job; when one fails, the other is cancelled."""
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(one)
            group.create_task(other)
    except BaseExceptionGroup as failed:
        # Both may have failed; the first cause is the one to tell.
        raise failed.exceptions[0] from None
