"""What a backend is: devices, and jobs that take row blocks.

A backend knows nothing of gRPC, of clients or of other jobs. Everything that
is declared here on `BackendJob` is called by the one thread of a device worker, but for
jobs that are too small for that (`Backend.inline_below_ops`).

A device may work beside the thread that talks to it. Work that such a device
has only begun is a `Wait`: the device worker begins more before it waits, so that bytes
go to the device, and come from it, while it computes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.job_spec import JobSpec
from gradwire_protocol.matrices import Matrix
from gradwire_server.backends.row_blocks import ALIGNMENT

Array = npt.NDArray[Any]

Sums: TypeAlias = Mapping[Matrix, Array]
"""Results that are summed over row blocks, or partial sums of them: those of
`JobSpec.sums`, in that order."""

Wait: TypeAlias = Callable[[], None]
"""Returns when work that has begun is done, or raises why it failed. It is
called once, in the thread that began the work, and in the order of beginning."""


class DeviceLostError(Exception):
    """A device that this process cannot use any more, whatever the job."""


@dataclass(slots=True)
class Times:
    """Seconds of a job's stages on its device. Stages may overlap."""

    to_device_s: float = 0.0
    """Copies from host memory; 0 where the device computes in that."""
    computing_s: float = 0.0
    """The products and the sums of them."""
    from_device_s: float = 0.0
    """Copies to host memory."""

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Counts what is done within this context as computing."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.computing_s += time.perf_counter() - started


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """A device of a backend, and what its results' last bits depend on."""

    backend: str
    index: int
    name: str
    memory_bytes: int
    library: str
    """Library that computes the products, with its version."""
    threads: int
    """Threads that share one product."""
    compute_capability: str = ""
    """CUDA's number for what the device can do, as "9.0"; empty where there is
    none."""
    in_host_memory: bool = False
    """Whether it computes in the host's memory, and has none of its own."""
    sums_rounded_to_nearest: tuple[Dtype, ...] = ()
    """Dtypes of operands whose products are summed with every addition rounded
    to nearest. Clients that verify allow sums of others more, but no more than
    tensor cores need: what rounds worse than those is found to be wrong."""
    ignores_tf32: bool = False
    """Whether products of float32 operands are the same where a job allows
    TF32. If not, clients that verify allow them more then."""


@dataclass(frozen=True, slots=True)
class RowBlock:
    """The matrices of one row block, in host memory.

    Each is C-contiguous with `rows` rows and the dtype that it has on the
    wire; those that the job does not have are None. x and dy are read, y and
    dx are written.
    """

    rows: int
    x: Array | None
    dy: Array | None
    y: Array | None
    dx: Array | None


class BackendJob(Protocol):
    """One job on one device.

    Its methods raise `MemoryError` where the device has no memory left, and
    `DeviceLostError` where the device is of no use any more. After either, or
    any other error, only `close` is called.
    """

    def take_w(self, w: Array) -> None:
        """Takes W, shape (n, k), before any row block.

        `w` stays as it is until the job is closed.
        """

    def take_sums(self, sums: Sums) -> None:
        """Goes on with these sums, in the accumulator's dtype.

        Only where sums are wanted, before any row block. They may change after it.
        """

    def compute_block(self, block: RowBlock) -> Wait | None:
        """Computes the block's Y and dX, and adds its share to each sum.

        Blocks come in order. None: y and dx hold the results. Otherwise they
        do after the wait, and until then the block's arrays are in use.
        """

    def copy_sums(self, out: Sums) -> None:
        """Copies the sums over the blocks so far, before they are rounded.

        Only where sums are wanted, between row blocks.

        Args:
            out: Host memory, C-contiguous, in the accumulator's dtype.
        """

    def finish(self) -> Sums:
        """The sums, C-contiguous, each in its dtype on the wire.

        Only where sums are wanted, once, after the last block.
        """

    def close(self) -> None:
        """Gives the job's memory on the device back.

        Nothing of the job is being done any more: whatever has begun was
        waited for. It may be called in any thread, and more than once.
        """


class Backend(Protocol):
    """A way to compute, with the devices that it drives."""

    name: str
    max_columns: int
    """Largest n and largest k that it takes."""

    inline_below_ops: int
    """Multiplications and additions of a job below which it may run in any
    thread, beside the device worker's: waking that takes as long. 0 where none may."""

    row_block_bytes: int
    """Bytes of a row block's operands with which it computes fast."""

    pipeline_depth: int
    """Most row blocks that a device has begun before the first is waited for;
    1 where it does one after the other."""

    devices: tuple[DeviceInfo, ...]

    def init_thread(self, device: int) -> None:
        """Called once in the thread of each device worker, before any of its jobs.

        Args:
            device: Index of the worker's device.
        """

    def job_bytes(self, spec: JobSpec, block_rows: int) -> int:
        """Bytes of host memory that `open_job` and `finish` will allocate.

        For a job that has places, with room for the sums given to `open_job`.
        """

    def device_bytes(self, spec: JobSpec, block_rows: int) -> int:
        """Bytes that `open_job` will allocate on the job's device.

        0 where the device has no memory of its own.
        """

    def empty(self, size_bytes: int) -> npt.NDArray[np.uint8]:
        """Uninitialised host memory for what goes to a device and comes back.

        It begins at a multiple of `ALIGNMENT`, and is given back when the last
        array that refers to it is gone. Called in the thread of a device worker.

        Raises:
            MemoryError: There is not so much.
        """

    def pin(self, memory: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Host memory that others share, made fast to copy to and from.

        Where that cannot be, it stays as it is. Called in any thread.

        Returns:
            The same bytes; what was done ends with the last array that refers
            to it, before `memory` can go.
        """

    def open_job(
        self,
        spec: JobSpec,
        block_rows: int,
        device: int,
        *,
        times: Times,
        sums: Sums | None = None,
    ) -> BackendJob:
        """A job on a device; takes the memory that the job needs there.

        Args:
            spec: What was asked.
            block_rows: Most rows of a block.
            device: Index of the device.
            times: Told how long the job's stages took.
            sums: Where the sums will lie, C-contiguous, each in its dtype on
                the wire; for jobs that have places. The backend may sum there,
                and `finish` then gives them back.

        Raises:
            MemoryError: The device has not so much left.
        """

    def close(self) -> None:
        """Gives up what the backend took from the process; no job is open."""

    def libraries(self) -> dict[str, str]:
        """Versions of the libraries that compute, by name."""


def empty_aligned(size_bytes: int) -> npt.NDArray[np.uint8]:
    """Uninitialised memory that begins at a multiple of `ALIGNMENT`."""
    memory = np.empty(size_bytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size_bytes]
