"""The methods of `gradwire.v1.GradientService`: decode, call, encode.

Every method receives and returns bytes. gRPC ends a call as UNKNOWN with the
exception's text if a deserializer raises, so messages are parsed here.

Every method is registered with streamed requests (the same bytes on the wire). For a
single request gRPC buffers the whole message before the call, so neither memory
accounting nor idle timeouts would apply until then. Compute returns a single response,
because gRPC then sends it together with the status, a good part of a small call's time.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TypeAlias

import grpc

from gradwire_protocol import framing
from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.limits import (
    MAX_MESSAGE_BYTES,
    REPORT_JOB_KEY,
    REPORT_KEY,
    REPORTS,
    SERVICE,
    SHARED_MEMORY,
)
from gradwire_protocol.v1 import gradient_service_pb2 as pb2
from gradwire_server.admission import tenancy
from gradwire_server.admission.quota import busy
from gradwire_server.api import server_info
from gradwire_server.api.call_scope import call_scope
from gradwire_server.api.call_state import CallState
from gradwire_server.api.call_stream import CallStream, both
from gradwire_server.api.direct_offer import DirectOffer, connections_for
from gradwire_server.api.job_service import JobService
from gradwire_server.api.receipts import accepted_message, receipt_message
from gradwire_server.errors import JobError, malformed
from gradwire_server.jobs.direct.direct_job import DirectJob
from gradwire_server.jobs.header import unary
from gradwire_server.jobs.header.parse import is_job_id
from gradwire_server.jobs.stream.pipeline import RowBlockPipeline
from gradwire_server.jobs.stream.streamed_job import StreamedJob
from gradwire_server.memory.shared_regions import Regions

Context: TypeAlias = grpc.aio.ServicerContext[bytes, bytes]


class GradientServicer:
    """Handlers of the four methods.

    Args:
        service: The job service.
        backend_reason: Why the backend was chosen, for GetServerInfo.
    """

    def __init__(self, service: JobService, backend_reason: str) -> None:
        self._service = service
        self._backend_reason = backend_reason
        self._idle_s = service.settings.idle_timeout

    def handler(self) -> grpc.GenericRpcHandler:
        """Return the handler to register with a gRPC server."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Compute": grpc.stream_unary_rpc_method_handler(self.compute),
                **{
                    name: grpc.stream_stream_rpc_method_handler(method)
                    for name, method in (
                        ("ComputeStream", self.compute_stream),
                        ("OpenRegion", self.open_region),
                        ("GetServerInfo", self.get_server_info),
                    )
                },
            },
        )

    async def get_server_info(self, _: AsyncIterator[bytes], context: Context) -> None:
        """Answer GetServerInfo, without waiting for its empty request."""
        self._take_report(context)
        answer = server_info.describe(self._service, self._backend_reason)
        await context.write(answer.SerializeToString())

    async def compute(self, _: AsyncIterator[bytes], context: Context) -> bytes | None:
        """Serve Compute: a small job in one message."""

        async def serve(call: CallState) -> bytes:
            async with aclosing(CallStream(self._idle_s, call, context)) as stream:
                request = await stream.read_request(pb2.ComputeRequest)
            if not request.HasField("job"):
                raise malformed("the request has no job: expected a ComputeRequest")
            spec = self._service.read_job(call, request.job)
            operands = unary.whole_operands(spec, request)
            size = unary.message_bytes(spec)
            results = await self._service.run(call, size, operands)
            response = pb2.ComputeResponse(
                accepted=accepted_message(call),
                receipt=receipt_message(call),
                **{result.label: array.tobytes() for result, array in results.items()},
            )
            return response.SerializeToString()

        return await call_scope(self._service, "Compute", context, serve)

    async def compute_stream(self, _: AsyncIterator[bytes], context: Context) -> None:
        """Serve ComputeStream: a job of any size, block by block."""

        async def serve(call: CallState) -> None:
            async with aclosing(CallStream(self._idle_s, call, context)) as stream:
                header = await stream.read_header()
                spec = self._service.read_job(call, header)
                message_bytes = 2 * (MAX_MESSAGE_BYTES + spec.max_chunk_bytes)
                if spec.buffers:
                    await self._compute_in_shared_memory(call, stream, message_bytes)
                    return
                async with self._service.streamed(
                    call, message_bytes, stream.tell_queued
                ) as pipeline:
                    await self._move(call, stream, pipeline)
                    receipt = receipt_message(call)
                    await stream.write(framing.encode_receipt(receipt))

        await call_scope(self._service, "ComputeStream", context, serve)

    async def open_region(self, _: AsyncIterator[bytes], context: Context) -> None:
        """Serve OpenRegion: memory shared for as long as the call is open."""

        async def serve(call: CallState) -> None:
            call.transport = "shm"
            _require_shared_memory(self._service, context.peer())
            async with aclosing(CallStream(self._idle_s, call, context)) as stream:
                asked = await stream.read_request(pb2.OpenRegionRequest)
                regions = self._service.regions
                if not asked.proof:
                    call.ends_by_cancelling = True
                    await stream.write(_challenge(regions).SerializeToString())
                    return
                if not regions.host_proof.is_proven(asked.proof):
                    raise JobError(
                        Reason.NOT_ALLOWED,
                        "the proof is not that of this server: memory is shared with "
                        "clients on the server's host, and this one is elsewhere, "
                        "behind a proxy on that host, or has the proof of another "
                        "server",
                        field="proof",
                    )
                async with regions.open(asked.size_bytes, call.tenant) as region:
                    answer = pb2.OpenRegionResponse(
                        token=region.token,
                        pid=os.getpid(),
                        fd=region.fd,
                        cookie=region.cookie,
                        size_bytes=region.size_bytes,
                    )
                    await stream.write(answer.SerializeToString())
                    call.ends_by_cancelling = True
                    await asyncio.get_running_loop().create_future()

        await call_scope(self._service, "OpenRegion", context, serve)

    def _take_report(self, context: Context) -> None:
        """Pass on what a client reports in the metadata of its call, if anything."""
        given = dict(context.invocation_metadata() or ())
        report, job_id = given.get(REPORT_KEY), given.get(REPORT_JOB_KEY, "")
        if not isinstance(report, str) or report not in REPORTS:
            return
        if not isinstance(job_id, str) or not is_job_id(job_id):
            job_id = ""
        observer = self._service.call_observer
        observer.reported(report, job_id, tenancy.current.get())

    async def _move(
        self, call: CallState, stream: CallStream, pipeline: RowBlockPipeline
    ) -> None:
        """Receive and send an admitted job's elements, where the client wants it."""
        with DirectOffer(self._service.data, connections_for(pipeline)) as offer:
            accepted = framing.encode_accepted(accepted_message(call, offer.access))
            choice = "or end" if offer.access is None else "end, or direct connections"
            expected = f"the first chunk of an operand, {choice}"
            stream.read_ahead(expected)  # it may be here already
            connections = None
            if offer.access is not None:
                await stream.accept(accepted)
                connections = await offer.taken(stream, expected)
            if connections is None:
                job = StreamedJob(pipeline)
                self._service.on_drain(job.hand_over)
                # Rows that are here already need not wait until it is sent.
                await stream.serve(job, accepted if offer.access is None else None)
                return
            call.transport = "direct"
            direct = DirectJob(pipeline, connections)
            self._service.on_drain(direct.hand_over)
            await stream.serve_direct(direct)
            offer.succeeded()

    async def _compute_in_shared_memory(
        self, call: CallState, stream: CallStream, message_bytes: int
    ) -> None:
        spec = call.header.spec
        async with self._service.in_shared_memory(
            call, message_bytes, stream.tell_queued
        ) as job:
            await stream.write(framing.encode_accepted(accepted_message(call)))
            await both(stream.receive_end(spec.m or 0), job.compute())
            await stream.write(framing.encode_receipt(receipt_message(call)))


def _require_shared_memory(service: JobService, peer: str) -> None:
    if SHARED_MEMORY not in service.features:
        raise JobError(
            Reason.FEATURE_UNKNOWN, "this server does not allow shared memory"
        )
    if not peer.startswith(_LOCAL_PEERS):
        raise JobError(
            Reason.NOT_ALLOWED,
            "memory is shared with clients of a loopback address or a unix socket, "
            f"and this one is {peer}",
        )


def _challenge(regions: Regions) -> pb2.OpenRegionResponse:
    try:
        return pb2.OpenRegionResponse(challenge=regions.host_proof.challenge())
    except OSError as error:
        raise busy("the process has no descriptors left", "regions") from error


_LOCAL_PEERS = ("unix", "ipv4:127.", "ipv6:[::1]", "ipv6:%5B::1%5D")
