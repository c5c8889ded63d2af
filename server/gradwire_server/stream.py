"""Both directions of one ComputeStream call."""

from __future__ import annotations

from typing import TypeAlias

import grpc

from gradwire.v1 import job_pb2
from gradwire.wire import framing
from gradwire.wire.checksum import crc32c
from gradwire.wire.reasons import Reason
from gradwire_server.errors import JobError, malformed
from gradwire_server.job import RunningJob
from gradwire_server.service import Call, Service
from gradwire_server.spec import JobSpec

Context: TypeAlias = grpc.aio.ServicerContext[bytes, bytes]


class Stream:
    """The messages of one call, with the patience that its client gets."""

    def __init__(self, service: Service, call: Call, context: Context) -> None:
        self._service = service
        self._call = call
        self._context = context

    async def read_header(self) -> job_pb2.Job:
        """The first message, which is the job's header."""
        message = await self._read("a job")
        if isinstance(message, job_pb2.Job):
            return message
        raise _unexpected(message, "a job first")

    async def tell_queued(self, jobs_ahead: int) -> None:
        """Says how many jobs come before this one."""
        await self.write(framing.encode_queued(jobs_ahead))

    async def receive(self, job: RunningJob) -> None:
        """Takes the operands, up to the half-close behind End."""
        while True:
            message = await self._read("the next block of an operand, or end")
            if isinstance(message, framing.Block):
                await job.take(message)
            elif isinstance(message, job_pb2.End):
                await job.end(message.m)
                break
            else:
                raise _unexpected(message, "a block or end")
        message = await self._read("the client's half-close after end")
        if message is not None:
            raise _unexpected(message, "nothing after end")

    async def send(self, job: RunningJob, spec: JobSpec) -> None:
        """Gives the results, in the order in which they are ready."""
        async for run in job.results():
            checksum = crc32c(run.payload) if spec.checksum else None
            await self.write(
                framing.encode_block(run.matrix, run.index, run.payload, checksum)
            )

    async def write(self, message: bytes) -> None:
        """Hands a message to gRPC; waits while the client does not read."""
        async with self._service.client_reads(self._call):
            await self._context.write(message)

    async def _read(self, expected: str) -> framing.RequestMessage | None:
        """The next message; None at the half-close."""
        async with self._service.client_sends(self._call, expected):
            message = await self._context.read()
        if not isinstance(message, bytes):  # it is grpc.aio.EOF
            return None
        try:
            return framing.decode_request(message)
        except framing.FramingError as error:
            raise malformed(str(error)) from None


def _unexpected(message: framing.RequestMessage | None, expected: str) -> JobError:
    if message is None:
        return JobError(
            Reason.END_MISSING,
            f"the client closed the stream without end: expected {expected}",
        )
    came = type(message).__name__.lower()
    return JobError(
        Reason.MESSAGE_UNEXPECTED, f"a message with {came} came: expected {expected}"
    )
