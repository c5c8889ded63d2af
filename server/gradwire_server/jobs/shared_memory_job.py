"""A job with all its matrices in shared memory, computed in place."""

from __future__ import annotations

import asyncio
from collections import deque
from functools import partial
from itertools import chain
from types import TracebackType
from typing import Self

import numpy as np

from gradwire_protocol.job_spec import JobSpec
from gradwire_protocol.matrices import Matrix
from gradwire_server.backends.base import Array, Sums
from gradwire_server.jobs.device_execution import DeviceExecution
from gradwire_server.memory.shared_regions import Region
from gradwire_server.scheduling.device_worker import TenantHandle
from gradwire_server.scheduling.job_progress import JobProgress
from gradwire_server.sessions.job_tensors import JobTensors


class SharedMemoryJob:
    """An admitted job in shared memory.

    It has the same row blocks as any job of its shape, and they take turns with other
    jobs' blocks on the device worker. A client that writes to the matrices meanwhile
    may spoil the results; no size or address is read from shared memory.

    Args:
        spec: The job's specification.
        computation: Its execution on a device.
        worker: The device worker.
        progress: Counters to update.
        regions: The regions with its matrices.
        tensors: The kept operands and results.

    Use it as an async context manager: after exit, for any cause, the worker no longer
    uses the regions.
    """

    def __init__(
        self,
        spec: JobSpec,
        computation: DeviceExecution,
        worker: TenantHandle,
        progress: JobProgress,
        regions: list[Region],
        *,
        tensors: JobTensors,
    ) -> None:
        self._tensors = tensors
        self._spec = spec
        self._worker = worker
        self._progress = progress
        self._computation = computation
        self._arrays = {matrix: _view(spec, matrix, regions) for matrix in spec.buffers}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            await self._worker.discard(self)
        finally:
            self._computation.close()
            self._arrays.clear()

    async def compute(self) -> None:
        """Compute every result into its buffer.

        Raises:
            Exception: The backend's error.
        """
        spec, progress, m = self._spec, self._progress, self._spec.m or 0
        sums = {each: self._arrays[each] for each in spec.sums if each in spec.buffers}
        await self._worker.submit(
            self, partial(self._computation.open, self._tensors.on_device, sums)
        )
        begun: deque[asyncio.Future[None]] = deque()
        arrays = self._tensors.in_host_memory | self._arrays
        work = chain(
            self._computation.pieces(arrays, m), self._tensors.copies(self._arrays)
        )
        for piece in work:
            begun.append(self._worker.begin(self, piece))
            # Enough pieces that the worker never waits for the event loop, and
            # few, because its queue keeps them all.
            if len(begun) > self._worker.max_in_flight + 1:
                await begun.popleft()
        if spec.sums:
            begun.append(self._worker.submit(self, partial(self._finish, sums)))
        while begun:
            await begun.popleft()
        self._tensors.commit()
        progress.m = m
        progress.bytes_received = spec.operands_bytes
        progress.bytes_sent = spec.results_bytes

    def _finish(self, places: Sums) -> None:
        """Finish the sums; runs in the worker thread."""
        for result, array in self._computation.finish(self._tensors).items():
            if array is not places[result]:
                np.copyto(places[result], array)


def _view(spec: JobSpec, matrix: Matrix, regions: list[Region]) -> Array:
    buffer = spec.buffers[matrix]
    size = spec.size_bytes(matrix)
    part = regions[buffer.region].memory[buffer.offset : buffer.offset + size]
    shape = matrix.shape(spec.m or 0, spec.n, spec.k)
    return part.view(spec.dtype_of(matrix).numpy).reshape(shape)
