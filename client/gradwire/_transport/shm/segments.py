"""Memory shared with a server on the same host, and arrays that lie there."""

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
from gradwire_protocol.limits import MIB, SHARED_ALIGNMENT
from gradwire_protocol.v1.gradient_service_pb2 import OpenRegionResponse

_ALIGNMENT = 256
"""Bytes to which arrays are aligned: more than the contract asks, and what the
fastest kernels like."""

_LEAST_BYTES = 16 * MIB
"""Smallest region that is opened, so that most clients need one."""

_MOST_AHEAD_BYTES = 256 * MIB
"""Most that a region is opened larger than what is needed of it, and most
free regions' bytes that are kept open."""


class CannotShareError(ConnectError):
    """Memory cannot be shared with the server, now or later."""


class Segment:
    """Memory that both sides have mapped.

    Args:
        answer: What the server said of it.
        end: Closes the call that keeps it open.

    Attributes:
        token: What the server calls it.
        alive: Whether the server still has it, as far as is known.

    Raises:
        CannotShareError: It cannot be opened from here.
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
        """Whether no array lies in it."""
        return self._holes == [(0, self.size_bytes)]

    def close(self) -> None:
        """Let the server have it back; arrays that lie there stay valid here."""
        self.alive = False
        self._end()

    def on_end(self) -> Callable[..., None]:
        """What to call when the server has closed it, or is gone.

        It does not keep the region alive, as a call that never ends would.
        """
        weak = weakref.ref(self)

        def ended(*_: object) -> None:
            region = weak()
            if region is not None:
                region.alive = False

        return ended

    def allocate(self, size_bytes: int) -> int | None:
        """Where so many bytes, a multiple of the alignment, are free now."""
        for position, (offset, free) in enumerate(self._holes):
            if free >= size_bytes:
                if free == size_bytes:
                    del self._holes[position]
                else:
                    self._holes[position] = (offset + size_bytes, free - size_bytes)
                return offset
        return None

    def free(self, offset: int, size_bytes: int) -> None:
        """These bytes are free again."""
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
        """An array of bytes, which every view of it keeps alive.

        NumPy lets a view keep alive the first array that is no view itself;
        so this must be none of an array of the whole region.
        """
        return np.frombuffer(self._memory, np.uint8, size_bytes, offset)


@dataclass(frozen=True, slots=True)
class Allocation:
    """Bytes of a region, free until the last view of `array` has died."""

    array: Array
    region: Segment
    offset: int


class Pool:
    """The regions of a client, and which of their bytes are free.

    An array's bytes are free again when the last view of it has died. Threads
    may share a pool.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._regions: list[Segment] = []
        # Arrays die wherever the interpreter happens to be, under the lock
        # as well, so that must not be taken there.
        self._died: deque[tuple[Segment, int, int]] = deque()

    def allocate(self, sizes: Sequence[int]) -> list[Allocation] | None:
        """Rooms of so many bytes each; None where not all of them fit."""
        with self._lock:
            self._tidy()
            return self._take(self._regions, sizes)

    def bytes_to_open(self, sizes: Sequence[int]) -> list[int]:
        """How large a region for such rooms may be: the best, then the least."""
        least = sum(map(_aligned, sizes))
        with self._lock:
            present = sum(region.size_bytes for region in self._regions)
        best = max(least, _LEAST_BYTES, min(present, _MOST_AHEAD_BYTES))
        return [best, least] if best > least else [least]

    def add(self, region: Segment, sizes: Sequence[int]) -> list[Allocation]:
        """Make use of a new region, first for rooms of these sizes."""
        with self._lock:
            rooms = self._take([region], sizes)
            if rooms is None:
                raise ValueError("the region is too small for its first rooms")
            self._regions.append(region)
            return rooms

    def find(self, array: Array) -> tuple[Segment, int] | None:
        """The region in which an array lies as jobs need it, and where there.

        None for an array that does not, or of another layout or byte order.
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
        """Close regions for good: what lies there is ordinary memory from now."""
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
        """Collects dead arrays' bytes, and closes what is too much."""
        while self._died:
            region, offset, size = self._died.popleft()
            region.free(offset, size)
        unused = [region for region in self._regions if region.alive and region.unused]
        # The largest is kept whatever its size: it is what a loop of large jobs
        # needs next, and taking its pages again costs more than it computes.
        kept = 0
        for region in sorted(unused, key=lambda each: each.size_bytes, reverse=True):
            kept += region.size_bytes
            if kept > max(_MOST_AHEAD_BYTES, region.size_bytes):
                region.close()
        self._regions = [region for region in self._regions if region.alive]


def _aligned(size_bytes: int) -> int:
    return -(-max(size_bytes, 1) // _ALIGNMENT) * _ALIGNMENT


def _mapped(answer: OpenRegionResponse) -> mmap.mmap:
    """The region's memory.

    The path may lead to anything at all where the server is of another host
    or process namespace, so it is looked at before it is opened, and what was
    opened before it is believed.
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
        raise CannotShareError(
            f"the server's shared memory cannot be opened from here ({error}): the"
            " server has to be of the same host, user and process namespace"
        ) from None


def _require(is_the_region: bool) -> None:
    if not is_the_region:
        raise OSError("another file is in its place")
