"""A backend with simulated devices, on which kept tensors lie in memory of their own.

`running_server(backend="simulated")` has a server compute with it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gradwire_protocol.dtypes import Dtype
from gradwire_server.backends.async_device.job import DeviceJob
from gradwire_server.backends.async_device.kept_memory import (
    DeviceKeptMemory,
    device_bytes,
)
from gradwire_server.backends.async_device.layout import make_layout
from gradwire_server.backends.base import DeviceInfo, empty_aligned
from tests.server.backends.simulated_device import SimulatedDevice

PIPELINE_DEPTH = 3


class Limited(SimulatedDevice):
    """A device with so much memory."""

    def __init__(self, memory_bytes: int) -> None:
        super().__init__(alone=False)
        self._memory_bytes = memory_bytes

    def allocate(self, size_bytes: int) -> Any:
        if self.taken_bytes + size_bytes > self._memory_bytes:
            raise MemoryError(f"there are no {size_bytes} bytes")
        return super().allocate(size_bytes)


class SimulatedBackend:
    """`gradwire_server.backends.base.Backend` with simulated devices.

    Args:
        memory: Bytes of each device's memory.
    """

    name = "simulated"
    max_columns = 2**31 - 1
    inline_below_ops = 0
    row_block_bytes = 1 << 20
    pipeline_depth = PIPELINE_DEPTH

    def __init__(self, *memory: int) -> None:
        self.simulated = [Limited(size) for size in memory]
        self.devices = tuple(
            DeviceInfo(
                backend=self.name,
                index=index,
                name="simulated",
                memory_bytes=size,
                library="SciPy's BLAS",
                threads=1,
                sums_rounded_to_nearest=tuple(Dtype),
            )
            for index, size in enumerate(memory)
        )

    def init_thread(self, device: int) -> None:
        np.seterr(all="ignore")

    def job_bytes(self, spec: Any, block_rows: int) -> int:
        return sum(spec.size_bytes(result) for result in spec.sums)

    def device_bytes(self, spec: Any, block_rows: int) -> int:
        return make_layout(spec, block_rows, PIPELINE_DEPTH).size_bytes

    def kept_bytes(self, keep_bytes: int) -> int:
        return device_bytes(keep_bytes)

    def open_kept(self, keep_bytes: int, device: int) -> DeviceKeptMemory:
        return DeviceKeptMemory(self.simulated[device], keep_bytes, self.empty)

    def empty(self, size_bytes: int) -> Any:
        return empty_aligned(size_bytes)

    def pin(self, memory: Any) -> Any:
        return memory

    def open_job(
        self, spec: Any, block_rows: int, device: int, **options: Any
    ) -> DeviceJob:
        return DeviceJob(
            spec,
            block_rows,
            PIPELINE_DEPTH,
            self.simulated[device],
            empty=self.empty,
            **options,
        )

    def close(self) -> None:
        pass

    def libraries(self) -> dict[str, str]:
        return {}
