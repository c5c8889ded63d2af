"""Updates of weights by their gradients, in NumPy and in place.

The formulas and their order are those of `gradwire.v1.StepRequest`, which are
PyTorch's. Scalars are computed in float64 and rounded once to the dtype of the
elements; elements are computed in their own dtype. PyTorch's vectorized kernels round
a product and the sum that follows it once, and NumPy rounds both: results differ from
PyTorch's in the last bits.

Elements are independent: updating slices of a weight, also in several threads, gives
the bits of updating it at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.optimizers import Adam, Optimizer, Sgd
from gradwire_server.backends.update_scalars import AdamScalars, SgdScalars

Floats: TypeAlias = npt.NDArray[np.floating[Any]]

CHUNK_BYTES = 1 << 18
"""Bytes of each array that are updated at once. A weight's, its gradient's, two
states' and two scratch arrays' stay in the processor's cache together, and Python takes
little of the time."""

SUMMED_AT_ONCE = 1 << 15
"""Elements whose squares are summed before they are added to the total. The bits of a
sum depend on it."""


def sum_of_squares(g: Floats) -> float:
    """Sum the squares of all elements.

    They are squared and summed in float64, so no float32 elements overflow: the sum
    of float32 elements is finite exactly if all of them are. Squares of float64
    elements overflow to Inf from 1.4e154 on. The bits of the sum depend on the
    elements and their order alone.

    Args:
        g: float32 or float64 elements of any shape, C-contiguous.

    Returns:
        The sum. NaN or Inf if an element is.
    """
    flat = g.reshape(-1, copy=False)
    squares = np.empty(min(flat.size, SUMMED_AT_ONCE), np.float64)
    total = 0.0
    with np.errstate(all="ignore"):
        for first in range(0, flat.size, SUMMED_AT_ONCE):
            some = flat[first : first + SUMMED_AT_ONCE]
            out = squares[: some.size]
            np.copyto(out, some)
            np.multiply(out, out, out=out)
            total += float(np.add.reduce(out))
    return total


def update(
    optimizer: Optimizer,
    p: Floats,
    g: Floats,
    states: Mapping[str, Floats],
    updates: int,
    *,
    scale: float = 1.0,
) -> None:
    """Update a weight and its states by a gradient, in place.

    Elements that overflow become Inf or NaN without a warning.

    Args:
        optimizer: Valid options, see `check_optimizer`.
        p: The weight: float32 or float64, of any shape, C-contiguous.
        g: Its gradient, of p's shape and dtype, C-contiguous. It is not changed.
        states: An array for each name of `optimizer.states`, of p's shape and dtype,
            C-contiguous.
        updates: Updates of the weight before this one. At 0, states have no effect
            on SGD, and must be 0 for Adam.
        scale: Factor of g, which is applied first.

    Raises:
        ValueError: An array is not C-contiguous, or shapes differ.
    """
    arrays = [p, g, *(states[name] for name in optimizer.states)]
    if any(array.shape != p.shape for array in arrays):
        shapes = ", ".join(str(array.shape) for array in arrays)
        raise ValueError(f"shapes of weight, gradient and states differ: {shapes}")
    flat = [array.reshape(-1, copy=False) for array in arrays]
    elements = CHUNK_BYTES // p.itemsize
    scratch = np.empty((2, min(p.size, elements)), p.dtype)
    with np.errstate(all="ignore"):
        chunks = _chunks(flat, scratch, elements)
        if isinstance(optimizer, Sgd):
            _sgd(optimizer, chunks, Dtype.of(p.dtype), first=not updates, scale=scale)
        else:
            _adam(optimizer, chunks, Dtype.of(p.dtype), t=updates + 1, scale=scale)


_Chunk: TypeAlias = list[Floats]
"""Elements of weight, gradient and states, then two scratch arrays."""


def _chunks(flat: list[Floats], scratch: Floats, elements: int) -> Iterator[_Chunk]:
    for first in range(0, flat[0].size, elements):
        chunk = [array[first : first + elements] for array in flat]
        yield [*chunk, *scratch[:, : chunk[0].size]]


def _sgd(
    optimizer: Sgd, chunks: Iterator[_Chunk], dtype: Dtype, *, first: bool, scale: float
) -> None:
    """Update by SGD; `first`: there is no momentum buffer yet.

    I. Sutskever, J. Martens, G. Dahl and G. Hinton, On the importance of
    initialization and momentum in deep learning, ICML 2013, as `torch.optim.SGD`
    states it: the learning rate is a factor of the whole step instead of the
    gradient in the momentum buffer.
    """
    f = SgdScalars.of(optimizer, dtype, scale)
    for p, g, *buffers, s, t in chunks:
        step = _scaled_and_decayed(p, g, s, t, f)
        for b in buffers:
            if first:
                np.copyto(b, step)
            else:
                np.multiply(b, f.momentum, out=b)
                np.add(b, np.multiply(step, f.undamped, out=t), out=b)
            if optimizer.nesterov:
                step = np.add(step, np.multiply(b, f.momentum, out=t), out=s)
            else:
                step = b
        np.subtract(p, np.multiply(step, f.lr, out=t), out=p)


def _adam(
    optimizer: Adam, chunks: Iterator[_Chunk], dtype: Dtype, *, t: int, scale: float
) -> None:
    """Update by Adam or AdamW, for the t-th time.

    D. P. Kingma and J. Ba, Adam: a method for stochastic optimization, ICLR 2015,
    algorithm 1, with epsilon beside the bias-corrected root; I. Loshchilov and
    F. Hutter, Decoupled weight decay regularization, ICLR 2019, algorithm 2, with the
    decay multiplied by the learning rate as in `torch.optim.AdamW`.
    """
    f = AdamScalars.of(optimizer, dtype, scale, t)
    for p, g, m, v, s, r in chunks:
        if f.kept != 1:
            np.multiply(p, f.kept, out=p)
        grad = _scaled_and_decayed(p, g, s, r, f)
        np.subtract(grad, m, out=r)
        if f.new < 0.5:
            np.add(m, np.multiply(r, f.new, out=r), out=m)
        else:  # As torch.lerp: at a factor of 1, m is exactly g.
            np.subtract(grad, np.multiply(r, 1 - f.new, out=r), out=m)
        np.multiply(v, f.decay2, out=v)
        np.multiply(grad, f.new2, out=r)
        np.add(v, np.multiply(r, grad, out=r), out=v)
        np.sqrt(v, out=r)
        np.divide(r, f.correction2, out=r)
        np.add(r, f.eps, out=r)
        np.multiply(m, f.step_size, out=s)
        np.subtract(p, np.divide(s, r, out=s), out=p)


def _scaled_and_decayed(
    p: Floats, g: Floats, s: Floats, t: Floats, f: SgdScalars | AdamScalars
) -> Floats:
    """Return scale g + weight_decay p, in s unless that is g itself."""
    if f.scale != 1:
        g = np.multiply(g, f.scale, out=s)
    if f.weight_decay:
        g = np.add(g, np.multiply(p, f.weight_decay, out=t), out=s)
    return g
