"""Products with batch dimensions and vectors, divided into jobs.

The shapes are those of `numpy.matmul`. A vector X is one row, a vector W is one column,
and the result loses that dimension. The batch dimensions of X (..., m, n) and
W (..., n, k) are broadcast. dX and dW have the shapes of X and W, so they are summed
over the dimensions along which an operand was repeated.

A job has one W. Each batch dimension is of one of three kinds:

- W has size 1, so all its matrices of X use the same W: more rows of one job. The job
  itself sums dW over them.
- X has size 1 and W does not, so one X is multiplied by several W: more columns of one
  job, W' = [W_0 W_1 ...]. X is sent once, and the job itself sums dX over them.
- Both have the size: a job for each index.

So no sum is left to the client, except for db.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from gradwire._api.errors import InputError
from gradwire._api.types import Array
from gradwire._arrays.operand import Source
from gradwire_protocol.matrices import Matrix

Shape: TypeAlias = tuple[int, ...]
Axes: TypeAlias = tuple[int, ...]


def needs_broadcast(sources: Mapping[Matrix, Source]) -> bool:
    """Return whether W is no matrix, or X or dY is a vector."""
    for matrix, source in sources.items():
        dimensions = source.array.ndim
        if dimensions != 2 and (dimensions < 2 or matrix is Matrix.W):
            return True
    return False


@dataclass(frozen=True, slots=True)
class Broadcast:
    """The division of a product into jobs.

    `batch`, `x_batch` and `w_batch` have one length: the batch dimensions of Y, X and
    W, with ones in front.
    """

    batch: Shape
    x_batch: Shape
    w_batch: Shape
    m: int
    n: int
    k: int
    one_row: bool
    """X is a vector, so that Y, dY and dX have no dimension m."""

    one_column: bool
    """W is a vector, so that Y, dY and dW have no dimension k."""

    shapes: Mapping[Matrix, Shape]
    """The shapes of the results."""

    loop_axes: Axes = field(init=False)
    """The batch dimensions with a job for each index."""

    row_axes: Axes = field(init=False)
    """The batch dimensions that are more rows of a job."""

    column_axes: Axes = field(init=False)
    """The batch dimensions that are more columns of a job."""

    def __post_init__(self) -> None:
        of: dict[str, list[int]] = {"loop": [], "row": [], "column": []}
        sizes = zip(self.x_batch, self.w_batch, strict=True)
        for axis, (x, w) in enumerate(sizes):
            of["row" if w == 1 else "column" if x == 1 else "loop"].append(axis)
        for kind, axes in of.items():
            object.__setattr__(self, f"{kind}_axes", tuple(axes))

    @classmethod
    def of(cls, given: Mapping[Matrix, Shape]) -> Broadcast:
        """Divide a product with operands of these shapes.

        Without W, it counts as a matrix. Without X, it counts as having all of dY's
        dimensions.

        Raises:
            InputError: The operands do not fit together.
        """
        x, w, dy = (given.get(each) for each in (Matrix.X, Matrix.W, Matrix.DY))
        for name, shape in (("x", x), ("w", w)):
            if shape == ():
                raise InputError(
                    f"{name} has shape (): expected at least one dimension, as for"
                    " numpy.matmul"
                )
        one_column = w is not None and len(w) == 1
        w_matrix = None if w is None else (*w, 1) if one_column else w
        w_batch = () if w_matrix is None else w_matrix[:-2]
        if x is not None:
            one_row = len(x) == 1
            x_matrix = (1, *x) if one_row else x
            x_batch, (m, n) = x_matrix[:-2], x_matrix[-2:]
            if w is not None and w_matrix is not None and n != w_matrix[-2]:
                raise InputError(
                    f"x has shape {x} and w {w}: x's last dimension ({n}) must equal"
                    f" w's {'only' if one_column else 'last but one'} dimension"
                    f" ({w_matrix[-2]})"
                )
            try:
                batch = np.broadcast_shapes(x_batch, w_batch)
            except ValueError:
                raise InputError(
                    f"x has shape {x} and w {w}: the batch dimensions {x_batch} and"
                    f" {w_batch} cannot be broadcast to one shape"
                ) from None
        else:
            x_batch, m, one_row = _rows_of(given[Matrix.DY], w, one_column)
            n = 0 if w_matrix is None else w_matrix[-2]
            batch = x_batch
        if w_matrix is not None:
            k = w_matrix[-1]
        elif dy == ():
            raise InputError("dy has shape (): expected at least one dimension")
        else:
            k = 0 if dy is None else dy[-1]
        y = (*batch, *(() if one_row else (m,)), *(() if one_column else (k,)))
        if dy is not None and dy != y:
            names = [f"x has shape {x}"] * (x is not None)
            names += [f"w has shape {w}"] * (w is not None)
            raise InputError(
                f"{' and '.join(names)}: expected dy of Y's shape {y}, but dy has"
                f" shape {dy}"
            )
        return cls(
            batch=batch,
            x_batch=_padded(x_batch, len(batch)),
            w_batch=_padded(w_batch, len(batch)),
            m=m,
            n=n,
            k=k,
            one_row=one_row,
            one_column=one_column,
            shapes={
                Matrix.Y: y,
                Matrix.DX: x or (*batch, *(() if one_row else (m,)), n),
                Matrix.DW: w or (n, k),
                Matrix.DB: () if one_column else (k,),
            },
        )

    @property
    def loop(self) -> Shape:
        """The sizes of the dimensions with a job for each index."""
        return tuple(self.batch[axis] for axis in self.loop_axes)

    @property
    def count(self) -> int:
        """The number of jobs."""
        return math.prod(self.loop)

    @property
    def folds(self) -> bool:
        """Whether one X is multiplied by several W, which takes copies."""
        return bool(self.column_axes)

    @property
    def joined_count(self) -> int:
        """How many matrices of W a job's W has beside each other."""
        return math.prod(self.batch[axis] for axis in self.column_axes)

    @property
    def columns(self) -> int:
        """Columns of a job's W."""
        return self.joined_count * self.k

    @property
    def rows(self) -> int:
        """Rows of a job's X and dY."""
        return math.prod(self.batch[axis] for axis in self.row_axes) * self.m

    def part(self, matrix: Matrix, array: Array, number: int) -> Array:
        """Return the part of an operand, or of a result's array, for one job.

        Args:
            matrix: X, W, dY, Y, dX or dW.
            array: The whole operand or result.
            number: The number of the job, in C order of `loop`.

        Returns:
            The matrix with its dimensions in the order of the job's elements:
            (rows..., m, n), (n, columns..., k) or (rows..., m, columns..., k). It
            shares memory with `array`.
        """
        like_x = matrix in (Matrix.X, Matrix.DX)
        like_w = matrix in (Matrix.W, Matrix.DW)
        view: Any = array
        if not like_x and self.one_column:
            view = view[..., None]
        if not like_w and self.one_row:
            view = view[..., None, :]
        view = view[(None,) * (len(self.batch) + 2 - view.ndim) + (...,)]
        loop, columns = self.loop_axes, self.column_axes
        at: list[Any] = [slice(None)] * len(self.batch)
        # Of size 1 in this matrix.
        for axis in columns if like_x else self.row_axes if like_w else ():
            at[axis] = 0
        for axis, index in zip(loop, np.unravel_index(number, self.loop), strict=True):
            at[axis] = int(index)
        part: Array = view[tuple(at)]
        if not columns or like_x:
            return part
        if like_w:
            return np.moveaxis(part, -2, 0)
        left = [axis for axis in range(len(self.batch)) if axis not in loop]
        first = [left.index(axis) for axis in self.row_axes]
        then = [left.index(axis) for axis in columns]
        return part.transpose(*first, len(left), *then, len(left) + 1)

    def joined(self, matrix: Matrix, part: Array) -> Array:
        """Return a part with the columns of a job's matrix in one dimension."""
        if not self.folds or matrix in (Matrix.X, Matrix.DX):
            return part
        lead = part.shape[: -1 - len(self.column_axes)]
        return part.reshape(*lead, self.columns)


def _padded(batch: Shape, dimensions: int) -> Shape:
    return (1,) * (dimensions - len(batch)) + batch


def _rows_of(dy: Shape, w: Shape | None, one_column: bool) -> tuple[Shape, int, bool]:
    """Return X's batch dimensions, m, and whether X is a vector, from dY.

    Raises:
        InputError: dY does not fit W.
    """
    lead = dy
    if not one_column:
        if not dy:
            raise InputError("dy has shape (): expected at least one dimension")
        lead = dy[:-1]
    one_row = not lead
    batch, m = lead[:-1], 1 if one_row else lead[-1]
    w_batch = () if w is None or one_column else w[:-2]
    try:
        fits = np.broadcast_shapes(batch, w_batch) == batch
    except ValueError:
        fits = False
    if not fits:
        raise InputError(
            f"dy has shape {dy} and w {w}: w's batch dimensions {w_batch} cannot be"
            f" broadcast to dy's {batch}; pass x, too, if it is a vector"
        )
    return batch, m, one_row
