"""The interface of an asynchronous device.

All methods except `synchronize`, `synchronize_all` and `allocate` only queue work on
one of three streams. The work of a stream is done in the order of queueing. Events are
the only order between streams.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from gradwire_protocol.optimizers import Optimizer
from gradwire_server.backends.async_device.gemm import DeviceMatrix, Gemm
from gradwire_server.backends.base import Array


class Stream(enum.Enum):
    """A queue of work on the device."""

    H2D = enum.auto()
    """Copies to the device."""
    COMPUTE = enum.auto()
    """Products and conversions."""
    D2H = enum.auto()
    """Copies from the device."""


Event: TypeAlias = Any
"""A point in a stream's work, with a time."""


@dataclass(slots=True, eq=False)
class Events:
    """The events of one row block, from the first copy to the last."""

    upload_begun: Event
    uploaded: Event
    compute_begun: Event
    computed: Event
    download_begun: Event
    done: Event


PARTIAL_SUMS = 1024
"""Partial sums of squares of an array."""


@dataclass(frozen=True, slots=True)
class Update:
    """Arguments of an update of weights, as those of `numpy.updates.update`.

    All matrices have the same number of elements and the same dtype, float32 or
    float64.
    """

    optimizer: Optimizer
    p: DeviceMatrix
    g: DeviceMatrix
    states: tuple[DeviceMatrix, ...]
    """In the order of `optimizer.states`."""
    made: int
    """Updates before this one."""
    scale: float
    """Factor of g, which is applied first."""


class DeviceMemory(Protocol):
    """A piece of the device's memory."""

    address: int

    def free(self) -> None:
        """Release the memory. May be called in any thread, and more than once."""


class Device(Protocol):
    """A device, used only in the thread of its device worker."""

    def errors(self) -> AbstractContextManager[None]:
        """Convert the device's errors in this context to those of a `BackendJob`.

        These are `MemoryError` and `DeviceLostError`. Other errors are unchanged.
        """

    def allocate(self, size_bytes: int) -> DeviceMemory:
        """Allocate memory that starts at a multiple of `ALIGNMENT`.

        Raises:
            MemoryError: There is not enough memory.
        """

    def events(self) -> Events:
        """Return unused events."""

    def release_events(self, events: Events) -> None:
        """Return events for reuse, after they were waited for."""

    def upload(self, source: Array, to: int) -> None:
        """Copy an array to an address, on `Stream.H2D`.

        The array must remain alive and unchanged until the copy is done.
        """

    def clear(self, address: int, size_bytes: int) -> None:
        """Set memory to 0, on `Stream.COMPUTE`."""

    def copy(self, source: int, to: int, size_bytes: int) -> None:
        """Copy memory that does not overlap, on `Stream.COMPUTE`."""

    def multiply(self, gemm: Gemm) -> None:
        """Compute a product, on `Stream.COMPUTE`."""

    def convert(self, source: DeviceMatrix, to: DeviceMatrix, *, add: bool) -> None:
        """Convert `source` to another dtype, on `Stream.COMPUTE`.

        Args:
            source: float32 or float64.
            to: The same number of elements in another dtype, rounded to nearest, ties
                to even.
            add: Whether to add to the elements of `to`, which is then float64.
        """

    def add(self, source: DeviceMatrix, to: DeviceMatrix) -> None:
        """Add elements to as many of the same dtype, on `Stream.COMPUTE`.

        Each sum is rounded once, to nearest, ties to even.
        """

    def sum_squares(self, source: DeviceMatrix, to: int) -> None:
        """Sum the squares of elements in float64, on `Stream.COMPUTE`.

        Args:
            source: float32 or float64.
            to: Address for `PARTIAL_SUMS` float64 partial sums. Which elements each is
                the sum of, and their order, depend on the number of elements alone.
        """

    def update(self, update: Update) -> None:
        """Update elements of a weight and of its states, on `Stream.COMPUTE`."""

    def download(self, source: int, to: Array) -> None:
        """Copy from an address to an array, on `Stream.D2H`.

        The array must remain alive until the copy is done.
        """

    def record(self, stream: Stream, event: Event) -> None:
        """Record an event after all work queued on a stream so far."""

    def wait(self, stream: Stream, event: Event) -> None:
        """Make all work queued on a stream from now on wait for an event."""

    def synchronize(self, event: Event) -> None:
        """Wait for an event, without blocking other threads."""

    def elapsed_s(self, begin: Event, end: Event) -> float:
        """Return the seconds between two events that have occurred."""

    def synchronize_all(self) -> None:
        """Wait for all queued work.

        It never raises: a lost device does no more work.
        """


@contextmanager
def begun(device: Device) -> Iterator[Events]:
    """Provide events for work queued in this context. After an error, wait for it.

    The wait is necessary because the memory in use is reused soon after an error.
    """
    with device.errors():
        events = device.events()
        try:
            yield events
        except BaseException:
            device.synchronize_all()
            raise


Allocate: TypeAlias = Callable[[int], Array]
"""Allocates host memory for fast copies to and from a device."""
