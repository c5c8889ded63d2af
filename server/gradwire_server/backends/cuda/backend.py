"""The CuPy backend: CUDA GPUs, with cuBLAS.

CuPy is imported when a backend is created, never before.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gradwire_protocol.job_spec import JobSpec
from gradwire_protocol.limits import MIB
from gradwire_protocol.matrices import Matrix
from gradwire_server.backends.async_device.gemm import MAX_SIZE
from gradwire_server.backends.async_device.job import DeviceJob
from gradwire_server.backends.async_device.kept_memory import (
    DeviceKeptMemory,
    device_bytes,
)
from gradwire_server.backends.async_device.layout import make_layout
from gradwire_server.backends.base import (
    DeviceInfo,
    Sums,
    Times,
)
from gradwire_server.backends.cuda.memory_pool import Pool, rounded_up
from gradwire_server.backends.cuda.pinned import empty_pinned
from gradwire_server.backends.host_limits import memory_bytes
from gradwire_server.backends.kept_memory import KeptArray

if TYPE_CHECKING:
    from gradwire_server.backends.cuda.device import CupyDevice

ROW_BLOCK_BYTES = 32 * MIB
"""On an H200, products of 16 MiB take a tenth longer, and products of 64 MiB are hardly
faster. Submitting a block takes the device worker's thread 0.2 ms, whatever the
block's size."""

PIPELINE_DEPTH = 4
"""Row blocks in progress on a device: one is copied to it, one is computed, one is
copied back, and one is queued, so that copies continue while the thread submits
another."""

MAX_FREE_PINNED_FRACTION = 1 / 16
"""Largest part of the machine's memory that stays pinned while no job uses it.
Pinning memory again costs as much as copying it several times."""

PINNED_SPARE = 1.25
"""Factor by which reused pinned memory may be larger than needed."""

MAX_FREE_DEVICE_FRACTION = 1 / 4
"""Largest part of a device's memory that is kept while no job uses it."""


class CupyBackend:
    """Computes on GPUs.

    Args:
        devices: CUDA's numbers of the GPUs; empty: all GPUs.
        memory_limit: Most bytes of each GPU's memory for jobs; None: no limit.

    Raises:
        ImportError: CuPy or a library of CUDA is missing.
        DeviceLostError: A GPU cannot be used, or there is no driver.
        MemoryError: A GPU has not enough memory for cuBLAS.
    """

    name = "cupy"
    max_columns = MAX_SIZE
    inline_below_ops = 0
    row_block_bytes = ROW_BLOCK_BYTES
    pipeline_depth = PIPELINE_DEPTH

    def __init__(
        self, devices: tuple[int, ...] = (), memory_limit: int | None = None
    ) -> None:
        from gradwire_server.backends.cuda import host  # noqa: PLC0415

        self._host = host
        self.devices: tuple[DeviceInfo, ...] = tuple(
            host.inspect(index) for index in devices or host.all_devices()
        )
        self._pinned: Pool[Any] = Pool(
            host.allocate_pinned,
            max_free_bytes=int(memory_bytes() * MAX_FREE_PINNED_FRACTION),
            spare=PINNED_SPARE,
        )
        self._memory: dict[int, Pool[Any]] = {
            device.index: Pool(
                host.allocate,
                max_free_bytes=int(
                    (memory_limit or device.memory_bytes) * MAX_FREE_DEVICE_FRACTION
                ),
                limit_bytes=memory_limit,
            )
            for device in self.devices
        }
        self._initialized: dict[int, CupyDevice] = {}

    def init_thread(self, device: int) -> None:
        """Create streams and a cuBLAS handle for the calling thread."""
        self._initialized[device] = self._host.CupyDevice(device, self._memory[device])

    def job_bytes(self, spec: JobSpec, block_rows: int) -> int:
        """Return the size of the pinned memory for the sums."""
        del block_rows
        if spec.buffers:
            return 0
        sent = (result for result in spec.sums if result not in spec.into)
        return sum(rounded_up(spec.size_bytes(result)) for result in sent)

    def device_bytes(self, spec: JobSpec, block_rows: int) -> int:
        """Return the size of W, the sums, scratch, and the row blocks in progress."""
        return rounded_up(make_layout(spec, block_rows, PIPELINE_DEPTH).size_bytes)

    def kept_bytes(self, keep_bytes: int) -> int:
        """Return the size of a session's memory, with room for its alignment."""
        return rounded_up(device_bytes(keep_bytes))

    def open_kept(self, keep_bytes: int, device: int) -> DeviceKeptMemory:
        """Allocate a session's memory on a GPU, in the thread of its device worker."""
        return DeviceKeptMemory(self._initialized[device], keep_bytes, self.empty)

    def empty(self, size_bytes: int) -> npt.NDArray[np.uint8]:
        """Return pinned memory. Freed memory is kept for reuse until `close`.

        At most `MAX_FREE_PINNED_FRACTION` of the machine's memory is kept.
        """
        return empty_pinned(self._pinned, size_bytes)

    def pin(self, memory: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Pin the memory until the last reference to the array."""
        return self._host.register(memory, self.devices[0].index)

    def open_job(
        self,
        spec: JobSpec,
        block_rows: int,
        device: int,
        *,
        times: Times,
        sums: Sums | None = None,
        kept: Mapping[Matrix, KeptArray] | None = None,
    ) -> DeviceJob:
        """Open a job on a GPU, in the thread of its device worker."""
        return DeviceJob(
            spec,
            block_rows,
            PIPELINE_DEPTH,
            self._initialized[device],
            times=times,
            empty=self.empty,
            sums=sums,
            kept=kept,
        )

    def close(self) -> None:
        """Release streams, handles and all memory."""
        for device in self._memory:
            self._host.with_device(device, partial(self._give_up, device))
        self._host.with_device(self.devices[0].index, self._pinned.clear)

    def libraries(self) -> dict[str, str]:
        """Return the versions of CuPy, cuBLAS, and CUDA's runtime and driver."""
        return self._host.libraries()

    def _give_up(self, device: int) -> None:
        self._initialized.pop(device, None)
        self._memory[device].clear()
