"""The memory of one session: what is in use, and what may be given up."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from typing import Generic, Protocol, TypeVar

from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.error_reasons import Reason
from gradwire_server.backends.kept_memory import KeptArray, KeptMemory, NoPieceError
from gradwire_server.errors import JobError


class HasArrays(Protocol):
    """Something with arrays of the session."""

    @property
    def arrays(self) -> Iterable[KeptArray]:
        """All its arrays."""


Owner = TypeVar("Owner", bound=HasArrays)


class SessionMemory(Generic[Owner]):
    """Memory for a session's arrays. All methods are thread-safe.

    Args:
        keep_bytes: Most bytes of all arrays.
        on_device: The memory on the session's device.

    Attributes:
        on_device: The memory on the session's device.
    """

    def __init__(self, keep_bytes: int, on_device: KeptMemory) -> None:
        self.on_device = on_device
        self._keep_bytes = keep_bytes
        self._used_bytes = 0
        self._spare: dict[int, Owner] = {}
        """What is not in use, and still there in case that it is wanted again, the
        oldest first. It is given up when its memory is needed."""
        self._spare_bytes = 0
        self._lock = threading.Lock()

    @property
    def used_bytes(self) -> int:
        """Bytes of the arrays in use."""
        return self._used_bytes

    def allocate(self, shape: tuple[int, ...], dtype: Dtype) -> KeptArray:
        """Allocate an array.

        Raises:
            JobError: The session has less memory.
            MemoryError: The system has less.
        """
        size_bytes = math.prod(shape) * dtype.itemsize
        with self._lock:
            self._make_room(size_bytes)
            array = self._placed(shape, dtype, size_bytes)
            self._used_bytes += size_bytes
            return array

    def share(self, *arrays: KeptArray) -> None:
        """Use arrays of another session, in host memory, as if they were allocated.

        They count here too: the other session may end, and then they are this one's.

        Raises:
            JobError: The session has less memory.
        """
        size_bytes = _size_bytes(arrays)
        with self._lock:
            self._make_room(size_bytes)
            self._used_bytes += size_bytes

    def exchange(self, own: Iterable[KeptArray], others: Iterable[KeptArray]) -> None:
        """Use arrays of another session, in host memory, in place of equal ones.

        Args:
            own: Arrays of this session, which are no longer used.
            others: As many, of the same sizes.
        """
        with self._lock:
            self._used_bytes += _size_bytes(others) - _size_bytes(own)
            self._free(own)

    def require(self, size_bytes: int) -> None:
        """Check that the session has so much memory, without taking it.

        Raises:
            JobError: It has less.
        """
        with self._lock:
            self._require(size_bytes)

    def release(self, *arrays: KeptArray) -> None:
        """Release arrays, which are no longer used."""
        with self._lock:
            self._used_bytes -= _size_bytes(arrays)
            self._free(arrays)

    def set_aside(self, number: int, owner: Owner) -> None:
        """Keep something that is no longer in use as long as there is memory."""
        with self._lock:
            size_bytes = _size_bytes(owner.arrays)
            self._used_bytes -= size_bytes
            self._spare[number] = owner
            self._spare_bytes += size_bytes

    def take_back(self, number: int) -> Owner | None:
        """Use again what was set aside under a number, if it is still there."""
        with self._lock:
            owner = self._spare.pop(number, None)
            if owner is not None:
                size_bytes = _size_bytes(owner.arrays)
                self._spare_bytes -= size_bytes
                self._used_bytes += size_bytes
            return owner

    def give_up(self, number: int) -> None:
        """Release what was set aside under a number, if it is still there."""
        with self._lock:
            self._give_up(number)

    def give_up_all(self) -> None:
        """Release everything that was set aside."""
        with self._lock:
            while self._spare:
                self._give_up_oldest()

    def close(self) -> None:
        """Release everything. Nothing of it is used any more."""
        with self._lock:
            self._spare.clear()
            self._spare_bytes = 0
            self.on_device.close()

    def _make_room(self, size_bytes: int) -> None:
        """Give up what is set aside, as far as its part of `keep_bytes` is needed."""
        self._require(size_bytes)
        used = self._used_bytes + size_bytes
        while used + self._spare_bytes > self._keep_bytes:
            self._give_up_oldest()

    def _placed(
        self, shape: tuple[int, ...], dtype: Dtype, size_bytes: int
    ) -> KeptArray:
        """Allocate on the device, giving up what is set aside if it is in the way."""
        while True:
            try:
                return self.on_device.allocate(shape, dtype)
            except MemoryError as error:
                if self._spare:
                    self._give_up_oldest()
                elif isinstance(error, NoPieceError):
                    raise self._no_piece(size_bytes) from None
                else:
                    raise

    def _give_up_oldest(self) -> None:
        self._give_up(next(iter(self._spare)))

    def _give_up(self, number: int) -> None:
        owner = self._spare.pop(number, None)
        if owner is not None:
            self._spare_bytes -= _size_bytes(owner.arrays)
            self._free(owner.arrays)

    def _free(self, arrays: Iterable[KeptArray]) -> None:
        for array in arrays:
            self.on_device.free(array)

    def _require(self, size_bytes: int) -> None:
        used = self._used_bytes + size_bytes
        if used > self._keep_bytes and size_bytes > 0:
            raise JobError(
                Reason.SESSION_FULL,
                f"{size_bytes} bytes are needed, and the session's tensors use "
                f"{self._used_bytes} of {self._keep_bytes}: open a session that "
                f"keeps at least {used} bytes",
                field="keep_bytes",
            )

    def _no_piece(self, size_bytes: int) -> JobError:
        return JobError(
            Reason.SESSION_FULL,
            f"{size_bytes} bytes are needed in one piece, and the session's tensors "
            f"use {self._used_bytes} of {self._keep_bytes} in other places: open the "
            f"session with a larger keep_bytes, or put large tensors first",
            field="keep_bytes",
        )


def _size_bytes(arrays: Iterable[KeptArray]) -> int:
    return sum(array.nbytes for array in arrays)
