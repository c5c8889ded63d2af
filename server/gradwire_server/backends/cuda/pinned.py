"""Arrays of pinned host memory, which a GPU copies at full speed."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gradwire_server.backends.cuda.memory_pool import Piece, Pool


class _Owner:
    """Owner of a piece, referenced by its array. It frees the piece."""

    __slots__ = ("__array_interface__", "_piece")

    def __init__(self, piece: Piece[Any], size_bytes: int) -> None:
        self._piece = piece
        self.__array_interface__ = {
            "shape": (size_bytes,),
            "typestr": "|u1",
            "data": (int(piece.memory.ptr), False),
            "version": 3,
        }

    def __del__(self) -> None:
        self._piece.free()


def empty_pinned(pool: Pool[Any], size_bytes: int) -> npt.NDArray[np.uint8]:
    """Return an uninitialized array in a pool's memory, freed with its last reference.

    Args:
        pool: A pool of memory with the address in `ptr`.
        size_bytes: Size of the array.

    Raises:
        MemoryError: There is not enough memory.
    """
    if not size_bytes:
        return np.empty(0, np.uint8)
    return np.asarray(_Owner(pool.take(size_bytes), size_bytes))
