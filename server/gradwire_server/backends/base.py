"""What a backend is: devices, and jobs that take row blocks.

A backend knows nothing of gRPC, of clients or of other jobs. Everything that
is declared here on `BackendJob` is called by the one thread of a lane, but for
jobs that are too small for that (`Backend.at_once_operations`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gradwire_server.spec import JobSpec

Array = npt.NDArray[Any]


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
    """One job on one device."""

    def take_w(self, w: Array) -> None:
        """Takes W, shape (n, k), before any row block. `w` stays as it is."""

    def take_block(self, block: RowBlock) -> None:
        """Computes the block's Y and dX, and adds its share to dW.

        Blocks come in order. When this returns, y and dx hold the results
        and x and dy are no longer needed.
        """

    def finish(self) -> Array:
        """dW, shape (n, k), C-contiguous, in its dtype on the wire.

        Only where dW is wanted, once, after the last block.
        """


class Backend(Protocol):
    """A way to compute, with the devices that it drives."""

    name: str
    max_columns: int
    """Largest n and largest k that it takes."""

    at_once_operations: int
    """Multiplications and additions of a job below which it may run in any
    thread, beside the lane's: waking that takes as long. 0 where none may."""

    devices: tuple[DeviceInfo, ...]

    def enter_lane(self) -> None:
        """Called once in the thread of each lane, before any of its jobs."""

    def job_bytes(self, spec: JobSpec, block_rows: int) -> int:
        """Bytes that `open_job` and `finish` will allocate.

        For a job that has places, with room for dW given to `open_job`.
        """

    def open_job(
        self, spec: JobSpec, block_rows: int, device: int, dw: Array | None = None
    ) -> BackendJob:
        """A job on a device; takes the memory that the job needs there.

        Args:
            spec: What was asked.
            block_rows: Most rows of a block.
            device: Index of the device.
            dw: Where dW will lie, shape (n, k), C-contiguous, in its dtype on
                the wire; for jobs that have places, if they want dW. The
                backend may sum there, and `finish` then gives it back.
        """

    def close(self) -> None:
        """Gives up what the backend took from the process; no job is open."""

    def libraries(self) -> dict[str, str]:
        """Versions of the libraries that compute, by name."""


def empty_aligned(size_bytes: int, alignment: int) -> npt.NDArray[np.uint8]:
    """Uninitialised memory that begins at a multiple of `alignment`."""
    memory = np.empty(size_bytes + alignment, np.uint8)
    start = -memory.ctypes.data % alignment
    return memory[start : start + size_bytes]
