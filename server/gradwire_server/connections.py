"""The connections of one job: the call that announced it, and those that join.

All of them are served within the first call's task, so that they end
together: whichever fails, the others are told the same cause.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from gradwire.v1 import job_pb2
from gradwire.wire import framing
from gradwire.wire.reasons import Reason
from gradwire_server.errors import JobError
from gradwire_server.job import RunningJob
from gradwire_server.stream import Stream, first_cause


@dataclass(slots=True, eq=False)
class _Seat:
    """The place of a connection that joins."""

    stream: Stream | None = None
    """That of the call that has taken it."""
    taken: asyncio.Event = field(default_factory=asyncio.Event)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    lost: bool = False
    """Whether the call has ended before it was served."""
    serving: asyncio.Task[None] | None = None


class Connections:
    """The connections of a job.

    Args:
        job_id: The job's name.
        count: How many it has, the first one included.
        idle_s: Seconds that the others have to join.
        tenant: Whose the job is.
    """

    def __init__(
        self, job_id: str, count: int, idle_s: float, tenant: str = ""
    ) -> None:
        self.job_id = job_id
        self.tenant = tenant
        self.count = count
        self.token = secrets.token_urlsafe(24) if count > 1 else ""
        """What a call that joins has to know; empty where none can."""
        self._idle_s = idle_s
        self._seats = {number: _Seat() for number in range(1, count)}
        self._cause: BaseException | None = None

    async def serve(self, first: Stream, job: RunningJob) -> None:
        """Takes the job's operands and gives its results, on all connections.

        Raises:
            JobError: One of them failed, or did not come.
        """
        if not self._seats:
            await first.serve(job)
            return
        try:
            async with asyncio.TaskGroup() as group:
                for number, seat in self._seats.items():
                    serving = self._serve_joined(number, seat, job)
                    seat.serving = group.create_task(serving)
                group.create_task(first.serve(job))
        except BaseExceptionGroup as failed:
            raise first_cause(failed) from None
        finally:
            for seat in self._seats.values():
                if seat.stream is not None:
                    first.add_times(seat.stream)

    async def join(self, number: int, stream: Stream) -> None:
        """Makes a call a connection of the job, and waits for its end.

        Raises:
            JobError: The number is none that is free, or the job failed.
        """
        seat = self._seats.get(number)
        if seat is None or seat.stream is not None:
            raise JobError(
                Reason.OPTION_INVALID,
                f"join.connection is {number}: expected 1 to {self.count - 1}"
                if seat is None
                else f"join.connection is {number}: that one has joined already",
                field="join.connection",
            )
        seat.stream = stream
        try:
            # Written here, where nobody cancels it but the call's own end: gRPC
            # sends no status after a first message that was cancelled.
            await stream.write(framing.encode_joined())
            seat.taken.set()
            await seat.over.wait()
        except BaseException:
            seat.lost = True
            seat.taken.set()
            if seat.serving is not None:
                seat.serving.cancel()
            raise
        if self._cause is not None:
            raise self._cause

    def end(self, cause: BaseException | None = None) -> None:
        """The job is over; tells those that joined why.

        Args:
            cause: Why it failed; None where it did not.
        """
        if isinstance(cause, asyncio.CancelledError):
            cause = _gone("the first connection")
        self._cause = cause.bare() if isinstance(cause, JobError) else cause
        for seat in self._seats.values():
            seat.over.set()

    async def _serve_joined(self, number: int, seat: _Seat, job: RunningJob) -> None:
        try:
            stream = await self._joined(number, seat)
            if not seat.lost:
                await stream.serve(job, number)
        except asyncio.CancelledError:
            if not seat.lost:
                raise
        if seat.lost:
            raise _gone(f"connection {number}")
        seat.over.set()

    async def _joined(self, number: int, seat: _Seat) -> Stream:
        try:
            async with asyncio.timeout(self._idle_s):
                await seat.taken.wait()
        except TimeoutError:
            raise JobError(
                Reason.CLIENT_IDLE,
                f"connection {number} of {self.count} did not join within "
                f"{self._idle_s:g} s",
            ) from None
        if seat.stream is None:
            raise RuntimeError("a connection joins with its stream")
        return seat.stream


class Joinable:
    """The jobs of a server that expect connections."""

    def __init__(self) -> None:
        self._jobs: list[Connections] = []

    @contextmanager
    def open(
        self, job_id: str, count: int, idle_s: float, tenant: str = ""
    ) -> Iterator[Connections]:
        """A job's connections, see there; within this context they can join."""
        connections = Connections(job_id, count, idle_s, tenant)
        if connections.token:
            self._jobs.append(connections)
        try:
            yield connections
        except BaseException as error:
            connections.end(error)
            raise
        else:
            connections.end()
        finally:
            if connections.token:
                self._jobs.remove(connections)

    def find(self, join: job_pb2.Join, tenant: str = "") -> Connections:
        """The connections of the job whose token that is.

        Raises:
            JobError: There is no such job here, or it is another tenant's.
        """
        token = join.token.encode()
        for connections in self._jobs:
            # How long a wrong one takes must not tell how much of it is right.
            if hmac.compare_digest(connections.token.encode(), token):
                if connections.tenant != tenant:
                    raise JobError(
                        Reason.NOT_ALLOWED,
                        "join.token is of a job of another tenant: all connections "
                        "of a job are of one",
                        field="join.token",
                    )
                return connections
        raise JobError(
            Reason.JOIN_UNKNOWN,
            "join.token is of no job that runs on this server: another replica gave "
            "it, or the job has ended",
            field="join.token",
        )


def _gone(which: str) -> JobError:
    return JobError(Reason.JOB_CANCELLED, f"{which} of the job was cancelled, or broke")
