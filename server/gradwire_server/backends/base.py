"""The interface of a backend: devices, and jobs that take row blocks.

A backend does not know gRPC, clients or other jobs. All methods of `BackendJob` are
called in the thread of a device worker, except for very small jobs
(`Backend.inline_below_ops`).

A device may be asynchronous. Its work in progress is represented by a `Wait`. The
device worker starts more work before it waits, so copies to and from the device overlap
with computation.
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
from gradwire_server.backends.kept_memory import KeptArray, KeptMemory
from gradwire_server.backends.row_blocks import ALIGNMENT

Array = npt.NDArray[Any]

Sums: TypeAlias = Mapping[Matrix, Array]
"""Results that are summed over row blocks, or partial sums of them: those of
`JobSpec.sums`, in that order."""

Wait: TypeAlias = Callable[[], None]
"""Waits for work in progress, and raises its error if it failed. Waits are called once
each, in the thread that started the work, and in the order of starting."""


class DeviceLostError(Exception):
    """This process can no longer use the device, for any job."""


@dataclass(slots=True)
class Times:
    """Seconds of a job's stages on its device. Stages may overlap."""

    to_device_s: float = 0.0
    """Copies from host memory; 0 if the device computes in host memory."""
    computing_s: float = 0.0
    """The products and the sums of them."""
    from_device_s: float = 0.0
    """Copies to host memory."""

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Count the time in this context as computing."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.computing_s += time.perf_counter() - started


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """A device of a backend, with everything that affects its results' last bits."""

    backend: str
    index: int
    name: str
    memory_bytes: int
    library: str
    """Library that computes the products, with its version."""
    threads: int
    """Threads that share one product."""
    compute_capability: str = ""
    """CUDA compute capability, such as "9.0"; empty if the device has none."""
    in_host_memory: bool = False
    """Whether the device computes in host memory, and has no memory of its own."""
    sums_rounded_to_nearest: tuple[Dtype, ...] = ()
    """Dtypes of operands for which the device rounds every addition to nearest. For
    other dtypes, verifying clients allow the larger errors of tensor cores. Even larger
    errors are reported as wrong results."""
    ignores_tf32: bool = False
    """Whether products of float32 operands are the same if a job allows TF32. If not,
    verifying clients allow larger errors for such jobs."""


@dataclass(frozen=True, slots=True)
class RowBlock:
    """The matrices of one row block, in host memory.

    Each matrix is C-contiguous, with `rows` rows and its dtype on the wire. Matrices
    that the job does not have are None, and so are operands that the device has already
    (`Backend.open_job`). x and dy are read; y and dx are written.
    """

    rows: int
    x: Array | None
    dy: Array | None
    y: Array | None
    dx: Array | None
    first_row: int = 0
    """The first of these rows in the job's matrices."""


class BackendJob(Protocol):
    """One job on one device.

    Methods raise `MemoryError` if the device is out of memory, and `DeviceLostError` if
    the device is no longer usable. After any error, only `close` is called.
    """

    def take_w(self, w: Array) -> None:
        """Take W, shape (n, k), before any row block.

        Not called if the device has W already. `w` does not change until the job is
        closed.
        """

    def take_sums(self, sums: Sums) -> None:
        """Continue these sums, in the accumulator's dtype.

        Called only if sums are wanted, before any row block, or after the last one in
        the place of its own sums. `sums` may change afterwards.
        """

    def compute_block(self, block: RowBlock) -> Wait | None:
        """Compute the block's Y and dX, and add its contribution to each sum.

        Blocks are computed in order.

        Returns:
            None if y and dx are complete. Otherwise they are complete after the wait,
            and the block's arrays are in use until then.
        """

    def copy_sums(self, out: Sums) -> None:
        """Copy the sums over the blocks so far, before they are rounded.

        Called only if sums are wanted, between row blocks.

        Args:
            out: Host memory, C-contiguous, in the accumulator's dtype.
        """

    def restart_sums(self) -> None:
        """Begin the sums anew: the next block's contribution is the first.

        Called only if sums are wanted, between row blocks.
        """

    def kept_sums(self) -> Mapping[Matrix, KeptArray]:
        """Return the sums that stay in the session (`JobSpec.into`).

        Called only if there are any, once, after the last block and before `finish`.

        Returns:
            Arrays like those of the session, each in its dtype on the wire. They are
            valid until the job is closed.
        """

    def finish(self) -> Sums:
        """Return the sums to send, C-contiguous, each in its dtype on the wire.

        Called only if there are any, once, after the last block.
        """

    def close(self) -> None:
        """Release the job's memory on the device.

        All work of the job has ended. May be called in any thread, and more than once.
        """


class Backend(Protocol):
    """A kind of devices, and the code that computes on them."""

    name: str
    max_columns: int
    """Largest supported n and k."""

    inline_below_ops: int
    """Jobs with fewer multiplications and additions may run in any thread, because
    waking the device worker's thread would take as long. 0: none may."""

    row_block_bytes: int
    """Size of a row block's operands for which the device is fast."""

    pipeline_depth: int
    """Most row blocks in progress on a device; 1 for synchronous devices."""

    devices: tuple[DeviceInfo, ...]

    def init_thread(self, device: int) -> None:
        """Initialize the thread of a device worker, before its first job.

        Args:
            device: Index of the worker's device.
        """

    def job_bytes(self, spec: JobSpec, block_rows: int) -> int:
        """Return the bytes of host memory that `open_job` and `finish` will allocate.

        For a job in shared memory, `open_job` is given the memory for the sums.
        """

    def device_bytes(self, spec: JobSpec, block_rows: int) -> int:
        """Return the bytes that `open_job` will allocate on the job's device.

        0 if the device has no memory of its own.
        """

    def kept_bytes(self, keep_bytes: int) -> int:
        """Return the bytes that `open_kept` will allocate on a session's device.

        0 if the device has no memory of its own.
        """

    def open_kept(self, keep_bytes: int, device: int) -> KeptMemory:
        """Open a session's memory on a device, in the thread of its device worker.

        Nothing that others have left there can be read from its arrays.

        Args:
            keep_bytes: Most bytes of all its arrays.
            device: Index of the device.

        Raises:
            MemoryError: The device has not enough memory left.
            DeviceLostError: The device is no longer usable.
        """

    def empty(self, size_bytes: int) -> npt.NDArray[np.uint8]:
        """Allocate uninitialized host memory for copies to and from a device.

        It starts at a multiple of `ALIGNMENT`, and is released after the last reference
        to the array. Called in the thread of a device worker.

        Raises:
            MemoryError: There is not enough memory.
        """

    def pin(self, memory: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Pin shared host memory for fast copies, if possible.

        Called in any thread.

        Returns:
            An array of the same bytes. They are unpinned after the last reference to
            it, before `memory` is released.
        """

    def open_job(
        self,
        spec: JobSpec,
        block_rows: int,
        device: int,
        *,
        times: Times,
        sums: Sums | None = None,
        kept: Mapping[Matrix, KeptArray] | None = None,
    ) -> BackendJob:
        """Open a job on a device, and allocate its memory there.

        Args:
            spec: The job.
            block_rows: Most rows of a row block.
            device: Index of the device.
            times: Counts the times of the job's stages.
            sums: Memory for the sums, C-contiguous, each in its dtype on the wire. Set
                for jobs in shared memory. The backend may sum there, and `finish` then
                returns them.
            kept: Operands that are arrays of a session in the device's own memory,
                whole. The job reads them there. Rows that are in a row block
                nevertheless are written there first.

        Raises:
            MemoryError: The device has not enough memory left.
        """

    def close(self) -> None:
        """Release all resources of the backend. No job is open."""

    def libraries(self) -> dict[str, str]:
        """Return the versions of the computing libraries, by name."""


def empty_aligned(size_bytes: int) -> npt.NDArray[np.uint8]:
    """Allocate uninitialized memory that starts at a multiple of `ALIGNMENT`."""
    memory = np.empty(size_bytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size_bytes]
