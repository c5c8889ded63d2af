"""NumPy in the caller's own process: the yardstick, with no transport."""

from __future__ import annotations

from bench.contenders.interface import ArrayContender, Arrays
from bench.work import Array, products


class LocalNumpy(ArrayContender):
    """Three products, into new arrays or the caller's."""

    def gradients(self, x: Array, w: Array, dy: Array, out: Arrays | None) -> Arrays:
        return products(x, w, dy, out)


create = LocalNumpy
