"""Admission and execution of jobs, common to all methods.

The servicer decodes and encodes messages. This module parses a job's header, waits for
its admission, runs it on a device worker, and ends it when the server stops or a device
fails.
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
from gradwire_protocol.limits import DIRECT, SESSION_STATE, SHARED_MEMORY
from gradwire_protocol.matrices import Matrix
from gradwire_protocol.v1 import job_pb2
from gradwire_server.admission.controller import Admission
from gradwire_server.api.call_state import CallState
from gradwire_server.backends.base import (
    Array,
    Backend,
    DeviceInfo,
    DeviceLostError,
)
from gradwire_server.backends.device_info import label
from gradwire_server.backends.host_memory import trim_malloc
from gradwire_server.backends.kept_memory import KeptMemory
from gradwire_server.backends.row_blocks import early_bytes
from gradwire_server.errors import BackendError, JobError
from gradwire_server.jobs.device_execution import DeviceExecution
from gradwire_server.jobs.header.cache import HeaderCache
from gradwire_server.jobs.header.parse import FEATURES, parse_job_id
from gradwire_server.jobs.header.resume import require_same_bits
from gradwire_server.jobs.header.shared_layout import check_region_sizes
from gradwire_server.jobs.registry import JobRegistry
from gradwire_server.jobs.shared_memory_job import SharedMemoryJob
from gradwire_server.jobs.stream.pipeline import RowBlockPipeline
from gradwire_server.memory.shared_regions import Regions
from gradwire_server.observability.calls import CallObserver
from gradwire_server.observability.timeline import Observe, no_observer
from gradwire_server.scheduling.device_selector import make_load
from gradwire_server.scheduling.device_worker import DeviceWorker, TenantHandle
from gradwire_server.sessions.accounts import Accounts
from gradwire_server.sessions.registry import Sessions
from gradwire_server.sessions.saved_states import SavedStates
from gradwire_server.sessions.session import Session
from gradwire_server.settings import Settings
from gradwire_server.transports.data_plane import DataListener

_log = logging.getLogger("gradwire_server")

OnLost: TypeAlias = Callable[[DeviceInfo, DeviceLostError], Awaitable[None]]
"""Called with the lost device and the error."""


class JobService:
    """A backend, its device workers, and the jobs on them.

    Args:
        settings: The operator's settings.
        backend: The backend.
        admission: The admission control.
        on_lost: Called when a device is lost, before the jobs are ended.
        call_observer: Is told of calls.
        observe: Called when row blocks are received, computed and sent.
        data: The listener for direct connections; None: there are none.
    """

    def __init__(
        self,
        settings: Settings,
        backend: Backend,
        admission: Admission,
        on_lost: OnLost,
        *,
        call_observer: CallObserver,
        observe: Observe = no_observer,
        data: DataListener | None = None,
    ) -> None:
        self.call_observer = call_observer
        self.data = data
        self._on_lost = on_lost
        self._device_is_lost = False
        self.observe = observe
        self.settings = settings
        self.backend = backend
        self.admission = admission
        self.regions = Regions(admission, backend.pin)
        self.features = FEATURES
        if settings.allow_shared_memory:
            self.features += (SHARED_MEMORY,)
        if data is not None:
            self.features += (DIRECT,)
        self.states: SavedStates | None = None
        if settings.state_dir is not None:
            self.states = SavedStates(settings.state_dir)
            self.features += (SESSION_STATE,)
        self.instance = secrets.token_hex(8)
        self.workers = [
            DeviceWorker(
                device.index,
                partial(backend.init_thread, device.index),
                max_in_flight=backend.pipeline_depth,
            )
            for device in backend.devices
        ]
        self.row_block_bytes = settings.row_block_bytes or backend.row_block_bytes
        self.early_bytes = early_bytes(self.row_block_bytes)
        self._headers = HeaderCache(
            backend,
            settings.device_memory_limit,
            self.features,
            self.row_block_bytes,
            self.instance,
        )
        self._jobs = JobRegistry()
        self.sessions = Sessions(
            Accounts(admission, settings.keep_limit, backend.kept_bytes),
            len(self.workers),
            self.instance,
            settings.session_lease_max,
            self._open_kept,
        )
        self._trim_timer: asyncio.TimerHandle | None = None

    async def ready(self) -> None:
        """Wait until every device is usable.

        Raises:
            BackendError: A device is not usable.
        """
        for worker, device in zip(self.workers, self.backend.devices, strict=True):
            try:
                await worker.entered()
            except Exception as error:
                raise BackendError(
                    f"{label(device)} cannot be used: {error}"
                ) from error

    def read_job(self, call: CallState, header: job_pb2.Job) -> JobSpec:
        """Check a header and plan the row blocks of its job.

        Raises:
            JobError: The header is invalid, or asks for an unknown or impossible
                option.
        """
        call.job_id = parse_job_id(header)
        call.read = self._headers.read(header)
        if call.read.spec.buffers:
            call.transport = "shm"
        return call.read.spec

    @asynccontextmanager
    async def admitted(
        self,
        call: CallState,
        host_bytes: int,
        on_wait: Callable[[int], Awaitable[None]],
        device: int | None = None,
    ) -> AsyncIterator[TenantHandle]:
        """Wait for the job's turn, and hold its memory within this context.

        Args:
            call: A call with a parsed header.
            host_bytes: Host memory of the job, without the backend's part.
            on_wait: Called with the number of jobs ahead.
            device: Position of the job's device; None: any.

        Yields:
            The worker of the job's device.
        """
        header = call.header
        call.reserved_bytes = host_bytes + header.backend_bytes
        load = make_load(
            header.spec, header.plan, header.device_bytes, call.progress, device
        )
        asked_at = call.asked_at = time.perf_counter()
        async with self.admission.job(
            call.reserved_bytes, load, on_wait, call.tenant
        ) as position:
            now = time.perf_counter()
            call.queued_s, call.waited_s = now - call.started, now - asked_at
            call.announced = header.announced[position]
            require_same_bits(header.spec, call.announced.fingerprint)
            call.admitted = True
            async with self._jobs.job():
                try:
                    yield self.workers[position].of(call.tenant)
                except MemoryError:
                    raise self._out_of_memory(call, position) from None
                except DeviceLostError as error:
                    raise await self.device_lost(position, error) from None

    @asynccontextmanager
    async def streamed(
        self,
        call: CallState,
        message_bytes: int,
        on_wait: Callable[[int], Awaitable[None]],
    ) -> AsyncIterator[RowBlockPipeline]:
        """Admit a job whose operands arrive while it runs.

        Args:
            call: A call with a parsed header.
            message_bytes: Memory of the call's messages.
            on_wait: Called with the number of jobs ahead.

        Yields:
            The job.
        """
        spec, plan = call.header.spec, call.header.plan
        host_bytes = plan.region_bytes + message_bytes
        observe = partial(self.observe, call.job_id)
        # A session's turn comes before memory: steps wait for jobs, never jobs that
        # hold memory for steps.
        async with (
            self.sessions.job(spec, call.tenant, on_wait) as tensors,
            self.admitted(call, host_bytes, on_wait, tensors.device) as worker,
            RowBlockPipeline(
                spec,
                plan,
                self.backend,
                worker,
                call.progress,
                tensors=tensors,
                observe=observe,
            ) as job,
        ):
            call.applied, call.session = tensors.applied, tensors.session_id
            yield job

    def on_drain(self, hand_over: Callable[[], bool]) -> None:
        """Register a graceful end for the calling task's job; see `JobRegistry`."""
        self._jobs.on_drain(hand_over)

    @asynccontextmanager
    async def in_shared_memory(
        self,
        call: CallState,
        message_bytes: int,
        on_wait: Callable[[int], Awaitable[None]],
    ) -> AsyncIterator[SharedMemoryJob]:
        """Admit a job with all its matrices in shared memory.

        Args:
            call: A call with a parsed header.
            message_bytes: Memory of the call's messages.
            on_wait: Called with the number of jobs ahead.

        Yields:
            The job.
        """
        spec, plan = call.header.spec, call.header.plan
        with self.regions.used(spec.regions, call.tenant) as regions:
            check_region_sizes(spec, [region.size_bytes for region in regions])
            async with (
                self.sessions.job(spec, call.tenant, on_wait) as tensors,
                self.admitted(call, message_bytes, on_wait, tensors.device) as worker,
            ):
                call.applied, call.session = tensors.applied, tensors.session_id
                execution = DeviceExecution(
                    spec, plan, self.backend, worker.device, call.progress
                )
                async with SharedMemoryJob(
                    spec, execution, worker, call.progress, regions, tensors=tensors
                ) as job:
                    yield job

    async def run(
        self, call: CallState, message_bytes: int, operands: Mapping[Matrix, memoryview]
    ) -> dict[Matrix, Array]:
        """Admit a job with complete operands, and compute it.

        Args:
            call: A call with a parsed header.
            message_bytes: Memory of the call's messages, with operands and results.
            operands: Elements of each sent operand.

        Returns:
            The results to send.
        """
        spec, plan = call.header.spec, call.header.plan
        async with (
            self.sessions.job(spec, call.tenant) as tensors,
            self.admitted(call, message_bytes, _not_told, tensors.device) as worker,
        ):
            call.applied, call.session = tensors.applied, tensors.session_id
            execution = DeviceExecution(
                spec, plan, self.backend, worker.device, call.progress
            )
            if spec.operations < self.backend.inline_below_ops and not spec.into:
                # Faster than waking the worker thread, and without a wait there
                # behind a row block of a large job.
                results = execution.run(operands, tensors)
            else:
                try:
                    results = await worker.submit(
                        call, partial(execution.run, operands, tensors)
                    )
                finally:
                    await worker.discard(call)
            tensors.commit()
        call.progress.m = spec.m or 0
        call.progress.bytes_received = spec.operands_bytes
        call.progress.bytes_sent = spec.results_bytes
        return results

    def worker_of(self, session: Session) -> TenantHandle:
        """Return the worker of a session's device, as seen by its tenant."""
        return self.workers[session.device].of(session.tenant)

    async def _open_kept(
        self, keep_bytes: int, position: int, tenant: str
    ) -> KeptMemory:
        """Open a session's memory on the device at a position."""
        device, opened = self.backend.devices[position], list[KeptMemory]()
        open_kept = partial(self.backend.open_kept, keep_bytes, device.index)
        if device.in_host_memory:
            return open_kept()
        worker, work = self.workers[position].of(tenant), object()
        try:
            await worker.submit(work, lambda: opened.append(open_kept()))
            return opened.pop()
        except DeviceLostError as error:
            raise await self.device_lost(position, error) from None
        finally:
            await worker.discard(work)
            for memory in opened:  # the caller has left
                memory.close()

    def job_ended(self, call: CallState) -> None:
        """Return free memory to the system if no other job ends for a while.

        An exception and its traceback's frames often form a reference cycle that holds
        the job's memory. After a failed job the cycle is collected at once, because
        many together could exceed the memory limit.
        """
        if call.admitted and not call.complete:
            gc.collect()
        loop = asyncio.get_running_loop()
        if self._trim_timer is not None:
            self._trim_timer.cancel()
        self._trim_timer = loop.call_later(
            IDLE_TRIM_S, loop.run_in_executor, None, trim_malloc
        )

    def hand_over_running_jobs(self) -> None:
        """End the running jobs after the grace period.

        A job ends with a checkpoint if it can; otherwise it is cancelled.
        """
        self._jobs.hand_over(_grace_is_over())

    def end_running_jobs(self) -> None:
        """Cancel the running jobs."""
        self._jobs.cancel_all(_grace_is_over())

    def close(self) -> None:
        """End the sessions and the device workers, and close the backend."""
        self.regions.host_proof.close()
        self.sessions.close_all()
        if self.states is not None:
            self.states.close()
        for worker in self.workers:
            worker.close()
        try:
            self.backend.close()
        except Exception as error:
            if not self._device_is_lost:
                raise
            # Memory on a lost device cannot be freed.
            _log.debug("the backend did not close: %s", error)

    def _out_of_memory(self, call: CallState, position: int) -> JobError:
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

    async def device_lost(self, position: int, error: DeviceLostError) -> JobError:
        """Cancel the other jobs, on all devices: the process is no longer usable.

        Returns:
            The error of the job that found the device lost.
        """
        device = self.backend.devices[position]
        lost = JobError(
            Reason.DEVICE_LOST,
            "a device of this server failed for good: the job was ended, and the "
            "server stops",
        )
        if not self._device_is_lost:
            self._device_is_lost = True
            self.admission.drain()
            await self._on_lost(device, error)
            self._jobs.cancel_all(lost)
        return lost


IDLE_TRIM_S = 15.0
"""Seconds without an ended job after which free memory is returned to the system. To
allocate it again costs time, and the steps of a training loop follow each other sooner
than this, even with a validation step or a slow batch in between."""


def _grace_is_over() -> JobError:
    return JobError(
        Reason.DRAINING,
        "the server stops, and its grace period is over: the job was ended",
    )


async def _not_told(_: int) -> None:
    """Ignore the number of jobs ahead: a unary call cannot report it."""
