"""The request and response messages of one call."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any, NoReturn, TypeAlias, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from gradwire_protocol import framing
from gradwire_protocol.checksum import crc32c
from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.v1 import job_pb2
from gradwire_server.api.call_state import CallState, never_busy
from gradwire_server.api.client_timeouts import IdleLimit
from gradwire_server.errors import (
    JobError,
    client_did_not_read,
    client_sent_nothing,
    malformed,
)
from gradwire_server.jobs.direct.direct_job import DirectJob
from gradwire_server.jobs.stream.checkpoints import Checkpoint
from gradwire_server.jobs.stream.streamed_job import StreamedJob
from gradwire_server.sessions.direct_transfer import DirectTransfer
from gradwire_server.transports.data_plane import Connection, Offer

Context: TypeAlias = grpc.aio.ServicerContext[bytes, bytes]
Request = TypeVar("Request", bound=Message)


class CallStream:
    """The messages of one call, read and written with client idle timeouts.

    It has to be closed.

    Args:
        idle_s: Seconds that the client may neither send nor read.
        call: The call's state.
        context: The call.
    """

    def __init__(self, idle_s: float, call: CallState, context: Context) -> None:
        self._idle_s = idle_s
        self._client_sends, self._client_reads = IdleLimit(idle_s), IdleLimit(idle_s)
        self._call = call
        self._context = context
        self._progress_at = asyncio.get_running_loop().time()
        self._ahead: asyncio.Task[bytes | None] | None = None
        """The next message, being read already."""
        self._accepting = False
        """Whether Accepted is on its way: the client may wait for it."""

    async def read_request(self, kind: type[Request]) -> Request:
        """Return the request of a method with a single request message."""
        message = await self._read_bytes("a request")
        if message is None:
            await self.await_cancellation()
            raise malformed(
                "the call ended before its request was complete: expected a "
                f"{kind.DESCRIPTOR.full_name}"
            )
        return _parse(kind, message)

    async def read_first(self, kind: type[Request], expected: str) -> Request:
        """Return the first request of a method with a stream of them.

        Args:
            kind: Its type.
            expected: What it is, for the error if nothing comes.
        """
        message = await self._read_bytes(expected)
        if message is None:
            await _refuse(None, expected)
        return _parse(kind, message)

    async def requests(
        self, kind: type[Request], expected: str
    ) -> AsyncIterator[Request]:
        """Yield the next requests, up to the half-close.

        The caller says with `progressed` which of them count as progress.

        Args:
            kind: Their type.
            expected: What comes next, for the error if nothing does.
        """
        self.progressed()
        while (message := await self._read_bytes(expected)) is not None:
            yield _parse(kind, message)

    async def read_header(self) -> job_pb2.Job:
        """Return the first message, a job's header."""
        message = await self._read("a job")
        if not isinstance(message, job_pb2.Job):
            await _refuse(message, "a job first")
        return message

    async def tell_queued(self, jobs_ahead: int) -> None:
        """Send the number of jobs ahead of this one."""
        await self.write(framing.encode_queued(jobs_ahead))

    async def accept(self, accepted: bytes) -> None:
        """Send Accepted; the time that the client may be idle begins afterwards."""
        self._accepting = True
        try:
            await self.write(accepted)
        finally:
            self._accepting = False
        self.progressed()

    async def serve(self, job: StreamedJob, accepted: bytes | None) -> None:
        """Receive the operands and send the results.

        Args:
            job: The job.
            accepted: Accepted, to send before them, if it was not sent.
        """
        self._call.idle_since = job.idle_since
        try:
            await both(self._receive(job), self._send(job, accepted))
        finally:
            # The call may outlive the job, and must not hold its memory.
            self._call.idle_since = never_busy

    def read_ahead(self, expected: str) -> asyncio.Task[bytes | None]:
        """Begin to read the next message, unless that has begun.

        Args:
            expected: What it is, for the error if nothing comes.
        """
        if self._ahead is None:
            self.progressed()
            self._ahead = asyncio.create_task(self._read_next(expected))
        return self._ahead

    async def attached(self, offer: Offer, expected: str) -> list[Connection] | None:
        """Wait for the client's choice of where the elements are.

        Args:
            offer: The direct connections.
            expected: What comes next, for the error if nothing does.

        Returns:
            The direct connections; None if the client sends in the call.
        """
        ahead = self.read_ahead(expected)
        attached = asyncio.create_task(offer.attached())
        try:
            await asyncio.wait({ahead, attached}, return_when=asyncio.FIRST_COMPLETED)
            # A short job's End may come in the same turn of the event loop as the
            # connections.
            return await attached if offer.complete else None
        finally:
            attached.cancel()

    async def serve_direct(self, job: DirectJob) -> None:
        """Receive and send on direct connections; only End comes in the call."""
        await self._beside(job, self._receive_end_of(job))

    async def serve_transfer(self, transfer: DirectTransfer[Any]) -> None:
        """Move a tensor on a direct connection; only the half-close comes here."""
        await self._beside(transfer, self._receive_end_of_tensor())

    async def _beside(
        self,
        direct: DirectJob | DirectTransfer[Any],
        receive: Coroutine[Any, Any, None],
    ) -> None:
        """Receive what comes in the call beside direct connections."""
        self._call.idle_since = direct.idle_since
        try:
            await both(receive, direct.run(self._idle_s))
        except JobError as error:
            if error.reason is Reason.CONNECTION_LOST:
                # A client that cancels its call closes the connections as well. That
                # may arrive first, and on a busy machine by more than the others.
                await asyncio.sleep(_LOST_S)
            raise
        finally:
            self._call.idle_since = never_busy
            self._call.receiving_s = direct.receiving_s
            self._call.sending_s = direct.sending_s

    async def read_half_close(self) -> None:
        """Wait for the client's half-close.

        Raises:
            JobError: A message came.
        """
        if await self._read_bytes("the half-close") is not None:
            raise JobError(
                Reason.MESSAGE_UNEXPECTED,
                "a message came: expected the half-close",
            )

    async def _receive_end_of_tensor(self) -> None:
        expected = "the half-close, because the elements are on a direct connection"
        if await self._read_bytes(expected) is not None:
            raise _sends_in_the_call()

    async def _receive_end_of(self, job: DirectJob) -> None:
        message = await self._read("end")
        if isinstance(message, framing.Chunk):
            raise _sends_in_the_call()
        if not isinstance(message, job_pb2.End):
            await _refuse(message, "end, because the elements are elsewhere")
        else:
            job.end(message.m)
        self.progressed()
        await self._read_half_close()

    async def aclose(self) -> None:
        """Read no more."""
        self._client_sends.close()
        self._client_reads.close()
        if self._ahead is not None:
            self._ahead.cancel()
            await asyncio.gather(self._ahead, return_exceptions=True)

    async def _receive(self, job: StreamedJob) -> None:
        """Receive the operands, up to the half-close after End."""
        self.progressed()
        while True:
            message = await self._read("the next chunk of an operand, or end")
            if isinstance(message, framing.Chunk):
                await job.take(message)
                if message.payload:  # messages without elements are no progress
                    self.progressed()
            elif isinstance(message, job_pb2.End):
                await job.end(message.m)
                self.progressed()
                break
            else:
                await _refuse(message, "a chunk or end")
        await self._read_half_close()

    async def receive_end(self, m: int) -> None:
        """Receive the End of a job in shared memory, and the half-close after it."""
        self.progressed()
        message = await self._read("end")
        if not isinstance(message, job_pb2.End):
            await _refuse(message, "end, because the job is in shared memory")
        elif message.m != m:
            raise JobError(
                Reason.M_MISMATCH,
                f"end.m is {message.m}, but job.m is {m}",
                field="end.m",
            )
        await self._read_half_close()

    async def _read_half_close(self) -> None:
        message = await self._read("the client's half-close after end")
        if message is not None:
            await _refuse(message, "nothing after end")

    async def _send(self, job: StreamedJob, accepted: bytes | None) -> None:
        """Send the results in the order in which they become ready."""
        stages = self._call.progress.stages
        if accepted is not None:
            await self.accept(accepted)
        async with aclosing(job.results()) as results:
            async for result in results:
                if isinstance(result, Checkpoint):
                    await self.write(framing.encode_checkpoint(result.rows))
                    continue
                if stages is not None:
                    stages.send.since(time.perf_counter())
                checksum = crc32c(result.payload) if job.spec.checksum else None
                await self.write(
                    framing.encode_chunk(
                        result.matrix, result.index, result.payload, checksum
                    )
                )
                if stages is not None:
                    stages.send.since(stages.send.first)

    async def write(self, message: bytes) -> None:
        """Pass a message to gRPC; wait while the client does not read."""
        started = time.perf_counter()
        try:
            with self._client_reads.wait():
                await self._pass_on(message)
        except TimeoutError:
            raise client_did_not_read(self._idle_s) from None
        except grpc.aio.InternalError as error:
            # The call is over: this task is about to be cancelled.
            await asyncio.sleep(_CANCELLATION_S)
            raise JobError(
                Reason.JOB_CANCELLED, "the call ended before its results were sent"
            ) from error
        finally:
            self._call.sending_s += time.perf_counter() - started

    async def _pass_on(self, message: bytes) -> None:
        if self._call.opening is not None:
            await self._context.write(message)
            return
        # A task of its own: the first message is not given up with this task.
        opening = asyncio.create_task(self._context.write(message))
        opening.add_done_callback(_mark_retrieved)
        self._call.opening = opening
        await asyncio.wait({opening})
        opening.result()

    async def _read(self, expected: str) -> framing.RequestMessage | None:
        """Return the next message, or None at the half-close."""
        message = await self._read_bytes(expected)
        if message is None:
            return None
        try:
            return framing.decode_request(message)
        except framing.FramingError as error:
            raise malformed(str(error)) from None

    async def _read_bytes(self, expected: str) -> bytes | None:
        ahead, self._ahead = self._ahead, None
        return await (self._read_next(expected) if ahead is None else ahead)

    async def _read_next(self, expected: str) -> bytes | None:
        started = time.perf_counter()
        try:
            with self._client_sends.wait(self._idle_since):
                message = await self._context.read()
        except TimeoutError:
            raise client_sent_nothing(self._idle_s, expected) from None
        finally:
            self._call.receiving_s += time.perf_counter() - started
            if (stages := self._call.progress.stages) is not None:
                stages.receive.since(started)
        return message if isinstance(message, bytes) else None  # grpc.aio.EOF

    def _idle_since(self) -> float:
        """Return since when the client has owed a message; event loop's clock.

        While received rows wait to be computed, or their results to be sent, the client
        may be waiting for the server, and does not count as idle.
        """
        if self._accepting:
            return asyncio.get_running_loop().time()
        return max(self._progress_at, self._call.idle_since())

    async def await_cancellation(self) -> None:
        """Wait for this task's cancellation, which may be about to arrive.

        A cancelled call reads like a half-closed one.
        """
        await asyncio.sleep(_CANCELLATION_S)

    def progressed(self) -> None:
        """Count the time that the client may be idle from now on."""
        self._progress_at = asyncio.get_running_loop().time()


def _mark_retrieved(opening: asyncio.Task[None]) -> None:
    # Nobody awaits it once its call has failed, and asyncio would log its error.
    if not opening.cancelled():
        opening.exception()


def _sends_in_the_call() -> JobError:
    # Its last connection was answered when it no longer waited.
    return JobError(
        Reason.CONNECTION_LOST,
        "the client has opened direct connections, and sends in the call",
    )


def _parse(kind: type[Request], message: bytes) -> Request:
    try:
        return kind.FromString(message)
    except DecodeError:
        what = kind.DESCRIPTOR.full_name
        raise malformed(f"the request is no {what}") from None


async def both(
    one: Coroutine[Any, Any, None], other: Coroutine[Any, Any, None]
) -> None:
    """Wait for two halves of a job; if one fails, cancel the other."""
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(one)
            group.create_task(other)
    except BaseExceptionGroup as failed:
        raise first_cause(failed) from None


def first_cause(failed: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the first error; later errors are its consequences."""
    cause = failed.exceptions[0]
    return first_cause(cause) if isinstance(cause, BaseExceptionGroup) else cause


async def _refuse(message: framing.RequestMessage | None, expected: str) -> NoReturn:
    if message is None:
        # A cancelled call reads like a half-closed one. Give this task's own
        # cancellation, the true cause, time to arrive.
        await asyncio.sleep(_CANCELLATION_S)
        raise JobError(
            Reason.END_MISSING,
            f"the client closed the stream without end: expected {expected}",
        )
    came = type(message).__name__.lower()
    raise JobError(
        Reason.MESSAGE_UNEXPECTED, f"a message with {came} came: expected {expected}"
    )


_CANCELLATION_S = 0.1

_LOST_S = 0.3
"""Seconds for the cancellation of a call whose direct connections broke."""
