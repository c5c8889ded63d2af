"""What the service does with a job, whichever call it came by.

The servicer decodes and encodes; this module admits a job, lets its two
halves (taking operands, giving results) run side by side, keeps the clients'
idle times, and accounts for it all in the receipt and the log.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeAlias

from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.job_spec import JobSpec
from gradwire_protocol.limits import SHARED_MEMORY
from gradwire_protocol.matrices import Matrix
from gradwire_protocol.v1 import job_pb2
from gradwire_server.admission.controller import Admission
from gradwire_server.api.call_state import Call
from gradwire_server.api.client_timeouts import patience
from gradwire_server.backends.base import (
    Array,
    Backend,
    DeviceInfo,
    DeviceLostError,
)
from gradwire_server.backends.device_info import label
from gradwire_server.backends.host_memory import give_back, peak_resident_bytes
from gradwire_server.errors import BackendError, JobError
from gradwire_server.jobs.device_execution import Computation
from gradwire_server.jobs.header.cache import Headers
from gradwire_server.jobs.header.parse import FEATURES, parse_job_id
from gradwire_server.jobs.header.resume import require_same_bits
from gradwire_server.jobs.header.shared_layout import check_region_sizes
from gradwire_server.jobs.registry import Running
from gradwire_server.jobs.shared_memory_job import InPlaceJob
from gradwire_server.jobs.stream.streamed_job import RunningJob
from gradwire_server.memory.shared_regions import Regions
from gradwire_server.observability.timeline import Observe, unobserved
from gradwire_server.scheduling.device_selector import load_of
from gradwire_server.scheduling.device_worker import Lane, TenantLane
from gradwire_server.settings import Settings

_log = logging.getLogger("gradwire_server")

OnLost: TypeAlias = Callable[[DeviceInfo, DeviceLostError], Awaitable[None]]
"""Told which device is lost, and why."""


class Service:
    """A backend, its lanes, and the jobs on them.

    Args:
        settings: What the operator chose.
        backend: What computes.
        admission: Who may run.
        on_lost: Told when a device is lost; jobs are ended after it.
        observe: Told when row blocks are received, computed and sent.
    """

    def __init__(
        self,
        settings: Settings,
        backend: Backend,
        admission: Admission,
        on_lost: OnLost,
        observe: Observe = unobserved,
    ) -> None:
        self._on_lost = on_lost
        self._lost = False
        self.observe = observe
        self.settings = settings
        self.backend = backend
        self.admission = admission
        self.regions = Regions(admission, backend.adopt)
        self.features = FEATURES
        if settings.allow_shared_memory:
            self.features += (SHARED_MEMORY,)
        self.instance = secrets.token_hex(8)
        self.lanes = [
            Lane(
                device.index,
                partial(backend.enter_lane, device.index),
                most_begun=backend.blocks_begun,
            )
            for device in backend.devices
        ]
        self._headers = Headers(
            backend,
            settings.device_memory_limit,
            self.features,
            settings.block_bytes or backend.block_bytes,
            self.instance,
        )
        self._running = Running()
        self._tidying: asyncio.TimerHandle | None = None

    async def ready(self) -> None:
        """Waits until every device can be used.

        Raises:
            BackendError: One of them cannot.
        """
        for lane, device in zip(self.lanes, self.backend.devices, strict=True):
            try:
                await lane.entered()
            except Exception as error:
                raise BackendError(
                    f"{label(device)} cannot be used: {error}"
                ) from error

    def read_job(self, call: Call, header: job_pb2.Job) -> JobSpec:
        """Checks a header and cuts its job into blocks.

        Raises:
            JobError: The header asks for what is wrong, unknown or impossible.
        """
        call.job_id = parse_job_id(header)
        call.read = self._headers.read(header)
        if call.read.spec.buffers:
            call.transport = "shm"
        return call.read.spec

    @asynccontextmanager
    async def admitted(
        self,
        call: Call,
        host_bytes: int,
        on_wait: Callable[[int], Awaitable[None]],
    ) -> AsyncIterator[TenantLane]:
        """Waits for the job's turn, and holds its memory within this context.

        Args:
            call: A call whose header was read.
            host_bytes: What the job holds of the host's memory beside what its
                backend takes.
            on_wait: Told how many jobs are ahead.

        Yields:
            The lane that the job is to run on.
        """
        header = call.header
        call.reserved_bytes = host_bytes + header.backend_bytes
        load = load_of(header.spec, header.plan, header.device_bytes, call.counts)
        async with self.admission.job(
            call.reserved_bytes, load, on_wait, call.tenant
        ) as position:
            call.queued_s = time.perf_counter() - call.started
            call.announced = header.announced[position]
            require_same_bits(header.spec, call.announced.fingerprint)
            call.admitted = True
            async with self._running.job():
                try:
                    yield self.lanes[position].of(call.tenant)
                except MemoryError:
                    raise self._out_of_memory(call, position) from None
                except DeviceLostError as error:
                    raise await self._device_lost(position, error) from None

    @asynccontextmanager
    async def streamed(
        self,
        call: Call,
        message_bytes: int,
        on_wait: Callable[[int], Awaitable[None]],
    ) -> AsyncIterator[RunningJob]:
        """Admits a job and runs it while its operands come.

        Args:
            call: A call whose header was read.
            message_bytes: What its messages hold.
            on_wait: Told how many jobs are ahead.

        Yields:
            The job.
        """
        spec, plan = call.header.spec, call.header.plan
        host_bytes = plan.region_bytes + message_bytes
        observe = partial(self.observe, call.job_id)
        async with (
            self.admitted(call, host_bytes, on_wait) as lane,
            RunningJob(
                spec, plan, self.backend, lane, call.counts, observe=observe
            ) as job,
        ):
            self._running.offer(job.hand_over)
            yield job

    @asynccontextmanager
    async def in_place(
        self,
        call: Call,
        message_bytes: int,
        on_wait: Callable[[int], Awaitable[None]],
    ) -> AsyncIterator[InPlaceJob]:
        """Admits a job whose matrices all lie in shared memory.

        Args:
            call: A call whose header was read.
            message_bytes: What its messages hold.
            on_wait: Told how many jobs are ahead.
        """
        spec, plan = call.header.spec, call.header.plan
        with self.regions.used(spec.regions, call.tenant) as regions:
            check_region_sizes(spec, [region.size_bytes for region in regions])
            async with self.admitted(call, message_bytes, on_wait) as lane:
                whole = Computation(spec, plan, self.backend, lane.device, call.counts)
                async with InPlaceJob(spec, whole, lane, call.counts, regions) as job:
                    yield job

    async def run(
        self, call: Call, message_bytes: int, operands: Mapping[Matrix, memoryview]
    ) -> dict[Matrix, Array]:
        """Admits a job whose operands are all there, and computes it.

        Args:
            call: A call whose header was read.
            message_bytes: What its messages hold, operands and results counted.
            operands: Elements of each operand.

        Returns:
            The wanted results.
        """
        spec, plan = call.header.spec, call.header.plan
        async with self.admitted(call, message_bytes, _not_told) as lane:
            whole = Computation(spec, plan, self.backend, lane.device, call.counts)
            if spec.operations < self.backend.at_once_operations:
                # It is over sooner than the lane's thread would be woken, and
                # need not wait there behind a row block of a large job.
                results = whole.run(operands)
            else:
                try:
                    results = await lane.submit(call, partial(whole.run, operands))
                finally:
                    await lane.discard(call)
        call.counts.m = spec.m or 0
        call.counts.bytes_received = spec.operands_bytes
        call.counts.bytes_sent = spec.results_bytes
        return results

    def accepted(self, call: Call) -> job_pb2.Accepted:
        """What the client is told before it sends W."""
        accepted = job_pb2.Accepted()
        accepted.CopyFrom(call.accepted)
        accepted.effective_job.job_id = call.job_id
        accepted.reserved_bytes = call.reserved_bytes
        return accepted

    def receipt(self, call: Call) -> job_pb2.Receipt:
        """What the client is told at the end."""
        counts = call.counts
        return job_pb2.Receipt(
            job_id=call.job_id,
            server_instance=self.instance,
            m=counts.m,
            blocks=counts.blocks,
            bytes_received=counts.bytes_received,
            bytes_sent=counts.bytes_sent,
            queued_seconds=call.queued_s,
            receiving_seconds=call.receiving_s,
            copy_to_device_seconds=counts.times.to_device_s,
            computing_seconds=counts.times.computing_s,
            copy_from_device_seconds=counts.times.from_device_s,
            sending_seconds=call.sending_s,
            total_seconds=time.perf_counter() - call.started,
            device=call.accepted.device,
            peak_memory_bytes=peak_resident_bytes(),
            transport=call.transport,
        )

    @asynccontextmanager
    async def client_sends(
        self, call: Call, since: float, what: str
    ) -> AsyncIterator[None]:
        """A wait for the client's next message, which must not be too long.

        While rows of it wait to be computed, or their results to leave, the
        client may be waiting for those: that is not its idleness.

        Args:
            call: The call.
            since: When the client last made progress; event loop's clock.
            what: What it is waited for.
        """
        idle_s = self.settings.idle_timeout
        started = time.perf_counter()
        try:
            async with patience(idle_s, lambda: max(since, call.idle_since())):
                yield
        except TimeoutError:
            raise JobError(
                Reason.CLIENT_IDLE,
                f"the client sent nothing for {idle_s:g} s: expected {what}",
            ) from None
        finally:
            call.receiving_s += time.perf_counter() - started

    @asynccontextmanager
    async def client_reads(self, call: Call) -> AsyncIterator[None]:
        """A wait for the client to read, which must not be too long."""
        idle_s = self.settings.idle_timeout
        started = time.perf_counter()
        try:
            async with patience(idle_s):
                yield
        except TimeoutError:
            raise JobError(
                Reason.CLIENT_IDLE,
                f"the client did not read for {idle_s:g} s what it was sent: it must "
                f"read while it writes",
            ) from None
        finally:
            call.sending_s += time.perf_counter() - started

    def job_ended(self, call: Call) -> None:
        """Has free memory given back when no job has ended for a while.

        An exception and the frames that it went through often refer to each
        other, and the frames to the job's memory: a job that was cut off has
        them collected now, lest many of them together outgrow the limit.
        """
        if call.admitted and not call.complete:
            gc.collect()
        loop = asyncio.get_running_loop()
        if self._tidying is not None:
            self._tidying.cancel()
        self._tidying = loop.call_later(_QUIET_S, loop.run_in_executor, None, give_back)

    def hand_over_running_jobs(self) -> None:
        """Has jobs end with a checkpoint that the grace period did not suffice for.

        Those that cannot are ended.
        """
        self._running.hand_over(_grace_is_over())

    def end_running_jobs(self) -> None:
        """Ends the jobs that still run."""
        self._running.end(_grace_is_over())

    def close(self) -> None:
        """Ends the lanes' threads and the backend."""
        for lane in self.lanes:
            lane.close()
        try:
            self.backend.close()
        except Exception as error:
            if not self._lost:
                raise
            # What was on a device that is lost cannot be given back to it.
            _log.debug("the backend did not close: %s", error)

    def _out_of_memory(self, call: Call, position: int) -> JobError:
        of_device = call.header.device_bytes
        size = f"{call.reserved_bytes} bytes of memory"
        if of_device:
            size += f", or {of_device} of the device's,"
        return JobError(
            Reason.DEVICE_OUT_OF_MEMORY,
            f"there are no {size} for this job on "
            f"{label(self.backend.devices[position])}, though the server's limits "
            f"allow it",
        )

    async def _device_lost(self, position: int, error: DeviceLostError) -> JobError:
        """Ends what runs, on whatever device; the process is of no use any more.

        Returns:
            What the job ends with that has found out.
        """
        device = self.backend.devices[position]
        lost = JobError(
            Reason.DEVICE_LOST,
            "a device of this server failed for good: the job was ended, and the "
            "server stops",
        )
        if not self._lost:
            self._lost = True
            self.admission.drain()
            await self._on_lost(device, error)
            self._running.end(lost)
        return lost


_QUIET_S = 15.0
"""Memory that is given back has to be had again, which costs time. Steps of a
training loop follow each other sooner than this, with a step of validation or
a slow batch between them too."""


def _grace_is_over() -> JobError:
    return JobError(
        Reason.DRAINING,
        "the server stops, and its grace period is over: the job was ended",
    )


async def _not_told(_: int) -> None:
    """A unary call cannot say that it waits."""
