"""Memory shared with a server on the same host, and the arrays in it."""

from __future__ import annotations

import bisect
import mmap
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gradwire._api.errors import ConnectError
from gradwire._api.types import Array
from gradwire_protocol.limits import MIB, PROOF_FILE, SHARED_ALIGNMENT
from gradwire_protocol.v1.gradient_service_pb2 import (
    OpenRegionResponse,
    RegionChallenge,
)

_ALIGNMENT = 256
"""Alignment of arrays: more than the contract requires, as the fastest kernels
prefer."""

_LEAST_BYTES = 16 * MIB
"""Smallest region to open, so that most clients need only one."""

_MOST_AHEAD_BYTES = 256 * MIB
"""Largest region opened in advance, and most bytes of unused regions kept open."""


class CannotShareError(ConnectError):
    """The server cannot share memory with this client."""


class Segment:
    """A region of memory mapped by client and server.

    Args:
        answer: The server's response.
        end: Closes the call that keeps the region open.

    Attributes:
        token: The server's token of the region.
        alive: Whether the region is open on the server, as far as known.

    Raises:
        CannotShareError: The memory cannot be opened here.
    """

    def __init__(self, answer: OpenRegionResponse, end: Callable[[], object]) -> None:
        self.token = answer.token
        self.size_bytes = answer.size_bytes
        self.alive = True
        self._end = end
        self._memory = _mapped(answer)
        self.address = np.frombuffer(self._memory, np.uint8).ctypes.data
        self._holes: list[tuple[int, int]] = [(0, self.size_bytes)]

    @property
    def unused(self) -> bool:
        """Whether the region has no arrays."""
        return self._holes == [(0, self.size_bytes)]

    def close(self) -> None:
        """Close the region on the server. Its arrays remain valid in this process."""
        self.alive = False
        self._end()

    def on_end(self) -> Callable[..., None]:
        """Return a function to call when the region has ended on the server.

        The function has a weak reference, because a call may never end.
        """
        weak = weakref.ref(self)

        def ended(*_: object) -> None:
            region = weak()
            if region is not None:
                region.alive = False

        return ended

    def allocate(self, size_bytes: int) -> int | None:
        """Allocate bytes, and return their offset; None: there is no space."""
        for position, (offset, free) in enumerate(self._holes):
            if free >= size_bytes:
                if free == size_bytes:
                    del self._holes[position]
                else:
                    self._holes[position] = (offset + size_bytes, free - size_bytes)
                return offset
        return None

    def free(self, offset: int, size_bytes: int) -> None:
        """Free allocated bytes."""
        position = bisect.bisect(self._holes, (offset, 0))
        if position < len(self._holes) and self._holes[position][0] == (
            offset + size_bytes
        ):
            size_bytes += self._holes.pop(position)[1]
        if position and sum(self._holes[position - 1]) == offset:
            position -= 1
            before, free = self._holes.pop(position)
            offset, size_bytes = before, free + size_bytes
        self._holes.insert(position, (offset, size_bytes))

    def array(self, offset: int, size_bytes: int) -> Array:
        """Return an array of bytes that every view of it keeps alive.

        A NumPy view keeps only its base array alive. So this array must not be a view
        of an array of the whole region.
        """
        return np.frombuffer(self._memory, np.uint8, size_bytes, offset)


@dataclass(frozen=True, slots=True)
class Allocation:
    """Allocated bytes of a region, freed after the last view of `array` is gone."""

    array: Array
    region: Segment
    offset: int


class Pool:
    """Allocates arrays in the regions of a client. Thread-safe.

    An array's bytes are freed after its last view is gone.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._regions: list[Segment] = []
        # Arrays may be collected anywhere, even while the lock is held. So their
        # finalizers must not take the lock.
        self._died: deque[tuple[Segment, int, int]] = deque()

    def allocate(self, sizes: Sequence[int]) -> list[Allocation] | None:
        """Allocate several arrays; None if not all of them fit."""
        with self._lock:
            self._tidy()
            return self._take(self._regions, sizes)

    def bytes_to_open(self, sizes: Sequence[int]) -> list[int]:
        """Return possible sizes of a new region for such arrays, the best first."""
        least = sum(map(_aligned, sizes))
        with self._lock:
            present = sum(region.size_bytes for region in self._regions)
        best = max(least, _LEAST_BYTES, min(present, _MOST_AHEAD_BYTES))
        return [best, least] if best > least else [least]

    def add(self, region: Segment, sizes: Sequence[int]) -> list[Allocation]:
        """Add a new region, and allocate arrays in it."""
        with self._lock:
            rooms = self._take([region], sizes)
            if rooms is None:
                raise ValueError("the region is too small for its first arrays")
            self._regions.append(region)
            return rooms

    def find(self, array: Array) -> tuple[Segment, int] | None:
        """Return the region and offset of an array that a job can use in place.

        None if the array is elsewhere, or has another layout or byte order.
        """
        if not (array.size and array.flags.c_contiguous and array.dtype.isnative):
            return None
        address = array.ctypes.data
        with self._lock:
            for region in self._regions:
                offset = address - region.address
                if 0 <= offset <= region.size_bytes - array.nbytes:
                    usable = region.alive and offset % SHARED_ALIGNMENT == 0
                    return (region, offset) if usable else None
        return None

    def invalidate(self, regions: Iterable[Segment]) -> None:
        """Close regions. Their arrays are ordinary memory from now on."""
        for region in regions:
            region.close()
        with self._lock:
            self._tidy()

    def close(self) -> None:
        """Close all regions."""
        with self._lock:
            regions, self._regions = self._regions, []
        for region in regions:
            region.close()

    def _take(
        self, regions: Sequence[Segment], sizes: Sequence[int]
    ) -> list[Allocation] | None:
        taken: list[tuple[Segment, int, int]] = []
        for size in map(_aligned, sizes):
            for region in regions:
                offset = region.allocate(size)
                if offset is not None:
                    taken.append((region, offset, size))
                    break
            else:
                for region, offset, given in taken:
                    region.free(offset, given)
                return None
        rooms = []
        for size, where in zip(sizes, taken, strict=True):
            region, offset, taken_bytes = where
            array = region.array(offset, taken_bytes)
            weakref.finalize(array, self._died.append, where).atexit = False
            rooms.append(Allocation(array[:size], region, offset))
        return rooms

    def _tidy(self) -> None:
        """Free the bytes of collected arrays, and close surplus regions."""
        while self._died:
            region, offset, size = self._died.popleft()
            region.free(offset, size)
        unused = [region for region in self._regions if region.alive and region.unused]
        # The largest region is kept, whatever its size: a loop of large jobs needs it
        # again, and new pages cost more than the computation.
        kept = 0
        for region in sorted(unused, key=lambda each: each.size_bytes, reverse=True):
            kept += region.size_bytes
            if kept > max(_MOST_AHEAD_BYTES, region.size_bytes):
                region.close()
        self._regions = [region for region in self._regions if region.alive]


def _aligned(size_bytes: int) -> int:
    return -(-max(size_bytes, 1) // _ALIGNMENT) * _ALIGNMENT


def proof_of(challenge: RegionChallenge) -> bytes:
    """Read the proof that this process shares the server's host.

    Raises:
        CannotShareError: The file cannot be read here.
    """
    path = Path(f"/proc/{challenge.pid}/fd/{challenge.fd}")
    try:
        _require(str(path.readlink()).startswith(f"/memfd:{PROOF_FILE}"))
        contents = path.read_bytes()
        _require(contents.startswith(challenge.cookie))
        return contents[len(challenge.cookie) :]
    except (OSError, ValueError) as error:
        raise _cannot_share(error) from None


def _cannot_share(error: Exception) -> CannotShareError:
    return CannotShareError(
        f"the server's shared memory cannot be opened here ({error}): the server must"
        " have the same host, user and process namespace"
    )


def _mapped(answer: OpenRegionResponse) -> mmap.mmap:
    """Map the region's memory.

    If the server has another host or process namespace, the path may be any file. So
    the path is checked before it is opened, and the file before it is mapped.
    """
    path = Path(f"/proc/{answer.pid}/fd/{answer.fd}")
    try:
        _require(str(path.readlink()).startswith("/memfd:gradwire-region"))
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
        try:
            _require(os.fstat(fd).st_size == answer.size_bytes)
            _require(os.pread(fd, len(answer.cookie), 0) == answer.cookie)
            return mmap.mmap(fd, answer.size_bytes)
        finally:
            os.close(fd)
    except (OSError, ValueError) as error:
        raise _cannot_share(error) from None


def _require(is_the_region: bool) -> None:
    if not is_the_region:
        raise OSError("another file is in its place")
