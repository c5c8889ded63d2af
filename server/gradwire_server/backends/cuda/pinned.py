"""Host memory that a GPU copies to and from at full speed, as arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gradwire_server.backends.cuda.memory_pool import Piece, Pool


class _Owner:
    """What an array refers to: its piece is given back with the last of them."""

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
    """Uninitialised memory of a pool, until the last array over it is gone.

    Args:
        pool: Of pieces whose `ptr` is the address of their first byte.
        size_bytes: Bytes of the array.

    Raises:
        MemoryError: There is not so much.
    """
    if not size_bytes:
        return np.empty(0, np.uint8)
    return np.asarray(_Owner(pool.take(size_bytes), size_bytes))
