"""What a job asks of a device that works beside the thread that talks to it.

Everything but `synchronize`, `synchronize_all` and taking memory only queues work on
one of three streams. Work on one stream is done in the order in which it was
queued; between streams there is no order but that of events.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from gradwire_server.backends.async_device.gemm import DeviceMatrix, Gemm
from gradwire_server.backends.base import Array


class Stream(enum.Enum):
    """A queue of work on the device."""

    H2D = enum.auto()
    """Copies to the device."""
    COMPUTE = enum.auto()
    """Products, and what is done with them there."""
    D2H = enum.auto()
    """Copies from the device."""


Event: TypeAlias = Any
"""A point in a stream's work, with its time."""


@dataclass(slots=True, eq=False)
class Events:
    """The events of one row block, from its first copy to its last."""

    upload_begun: Event
    uploaded: Event
    compute_begun: Event
    computed: Event
    download_begun: Event
    done: Event


class DeviceMemory(Protocol):
    """A piece of the device's memory."""

    address: int

    def free(self) -> None:
        """Lets others have it; in any thread, and more than once."""


class Device(Protocol):
    """A device, for the thread of its device worker alone."""

    def errors(self) -> AbstractContextManager[None]:
        """Within it, the device's own errors become those of a backend's job.

        That is `MemoryError` and `DeviceLostError`; others stay what they are.
        """

    def allocate(self, size_bytes: int) -> DeviceMemory:
        """Memory that begins at a multiple of `ALIGNMENT`.

        Raises:
            MemoryError: There is not so much.
        """

    def events(self) -> Events:
        """Events that nobody uses."""

    def release_events(self, events: Events) -> None:
        """Lets others have them; they were waited for."""

    def upload(self, source: Array, to: int) -> None:
        """Copies an array to an address, on `Stream.H2D`.

        The array stays alive and as it is until that is done.
        """

    def multiply(self, gemm: Gemm) -> None:
        """Computes a product, on `Stream.COMPUTE`."""

    def convert(self, source: DeviceMatrix, to: DeviceMatrix, *, add: bool) -> None:
        """Writes `source` in another dtype, on `Stream.COMPUTE`.

        Args:
            source: float32 or float64.
            to: As many elements of another dtype, rounded to nearest, ties to
                even.
            add: Whether it is added to what `to` holds, which is float64.
        """

    def download(self, source: int, to: Array) -> None:
        """Copies from an address to an array, on `Stream.D2H`.

        The array stays alive until that is done.
        """

    def record(self, stream: Stream, event: Event) -> None:
        """Marks the end of what was queued on a stream so far."""

    def wait(self, stream: Stream, event: Event) -> None:
        """Has what is queued on a stream from now on wait for an event."""

    def synchronize(self, event: Event) -> None:
        """Returns when an event is reached; other threads run meanwhile."""

    def elapsed_s(self, begin: Event, end: Event) -> float:
        """Seconds between two events that were reached."""

    def synchronize_all(self) -> None:
        """Returns when nothing that was queued is being done any more.

        It never raises: a device that is lost does nothing any more.
        """


Allocate: TypeAlias = Callable[[int], Array]
"""Bytes of host memory that a device copies fast to and from."""
