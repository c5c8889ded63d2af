"""The products of a row block, for any array library.

    Y_b  = X_b W
    dX_b = dY_b Wᵀ
    dW  += X_bᵀ dY_b
    dB  += 1ᵀ dY_b

with X_b (rows, n), W (n, k), dY_b and Y_b (rows, k), dX_b (rows, n), dW (n, k), a
column 1 of as many ones and dB (1, k). The sum of dW over the blocks is Xᵀ dY,
because a product over m rows is the sum of the products over any partition of
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeVar

from gradwire_protocol.matrices import Matrix

Operand = TypeVar("Operand")
Result = TypeVar("Result")
Sum = TypeVar("Sum")
Operand_contra = TypeVar("Operand_contra", contravariant=True)
Result_contra = TypeVar("Result_contra", contravariant=True)
Sum_contra = TypeVar("Sum_contra", contravariant=True)


class Products(Protocol[Operand_contra, Result_contra, Sum_contra]):
    """A library's products into existing memory.

    Operands, the results Y and dX, and sums may have different types.
    """

    def multiply(
        self, a: Operand_contra, b: Operand_contra, out: Result_contra
    ) -> None:
        """Compute out = a b."""

    def multiply_transposed(
        self, a: Operand_contra, b: Operand_contra, out: Result_contra
    ) -> None:
        """Compute out = a bᵀ."""

    def accumulate_transposed(
        self, a: Operand_contra, b: Operand_contra, out: Sum_contra
    ) -> None:
        """Compute out += aᵀ b."""


def compute_block(
    products: Products[Operand, Result, Sum],
    *,
    w: Operand | None,
    x: Operand | None,
    dy: Operand | None,
    y: Result | None,
    dx: Result | None,
    ones: Operand | None,
    sums: Mapping[Matrix, Sum],
) -> None:
    """Compute the wanted results of a row block: y and dx if not None, and `sums`.

    The operands that they need must not be None either.
    """
    if y is not None and x is not None and w is not None:
        products.multiply(x, w, y)
    if dx is not None and dy is not None and w is not None:
        products.multiply_transposed(dy, w, dx)
    dw = sums.get(Matrix.DW)
    if dw is not None and x is not None and dy is not None:
        products.accumulate_transposed(x, dy, dw)
    db = sums.get(Matrix.DB)
    if db is not None and ones is not None and dy is not None:
        products.accumulate_transposed(ones, dy, db)
