"""`matmul` and `linear`: shapes and options, and the division into products."""

from __future__ import annotations

import weakref
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp

from gradwire._api.errors import InputError
from gradwire._api.options import BlockRows, DtypeLike, check_names, parse_options
from gradwire._api.verify import VerifyLike
from gradwire._client._sync.client import Client
from gradwire._core.broadcast import Broadcast
from gradwire.jax._job import Route
from gradwire.jax._products import products
from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.matrices import Matrix


class ProductOptions(TypedDict, total=False):
    """The options of `linear` and `matmul`, as for `Client.gradients`."""

    wire_dtype: DtypeLike
    dw_accumulator: DtypeLike
    allow_tf32: bool
    checksum: bool
    verify: VerifyLike
    timeout_s: float | None
    block_rows: BlockRows | None


def matmul(
    x: Any, w: Any, *, client: Client, **options: Unpack[ProductOptions]
) -> jax.Array:
    """Compute Y = X W on a server, as `jax.numpy.matmul`.

    The function can be transformed like any of JAX: by `jax.jit`, `jax.grad` and
    `jax.jvp` to any order, `jax.vmap`, `jax.checkpoint`, and in `jax.lax.scan` and
    other control flow. A backward pass asks for dX, dW or both in one job, as they are
    needed. `jax.vmap` over X alone gives more rows of one job, in the backward pass,
    too. docs/jax.md has the details.

    Args:
        x: X, shape (..., n) or (n,).
        w: W, shape (n, k), (n,) or (..., n, k), of X's dtype: float16, bfloat16,
            float32, or float64 with ``jax_enable_x64``. Batch dimensions of X and W are
            broadcast.
        client: The client that computes, which `connect` returns. The function keeps no
            reference to it.
        **options: `wire_dtype`, `dw_accumulator`, `allow_tf32`, `checksum`, `verify`,
            `timeout_s` and `block_rows`, as for `Client.gradients`.

    Returns:
        Y, of the shape of ``jnp.matmul(x, w)`` and the operands' dtype.

    Raises:
        InputError: An argument is invalid.
        TypeError: The name of an option is unknown.
        jax.errors.JaxRuntimeError: The job failed; raised where the result is waited
            for, or as a ValueError here. The last line of its text has the class and
            the message of the `GradwireError`.

    Example:
        >>> loss = lambda w: (gradwire.jax.matmul(x, w, client=client) ** 2).sum()
        >>> dw = jax.jit(jax.grad(loss))(w)
    """
    check_names("matmul", options, ProductOptions)
    return _matmul(x, w, client, options)


def linear(
    x: Any,
    w: Any,
    b: Any = None,
    *,
    client: Client,
    **options: Unpack[ProductOptions],
) -> jax.Array:
    """Compute Y = X W + b, with the product on a server.

    Args:
        x: X, shape (..., n).
        w: W, shape (n, k): (inputs, outputs), as the kernel of Flax's Dense.
        b: The bias, shape (k,). It is added here, in Y's dtype.
        client: As for `matmul`.
        **options: As for `matmul`.

    Returns:
        Y, shape (..., k), of the dtype of X and W.

    Raises:
        InputError: An argument is invalid.
        TypeError: The name of an option is unknown.
        jax.errors.JaxRuntimeError: The job failed; see `matmul`.

    Example:
        >>> y = gradwire.jax.linear(x, params["kernel"], params["bias"], client=client)
    """
    check_names("linear", options, ProductOptions)
    if jnp.ndim(w) != 2:
        raise InputError(f"w has shape {jnp.shape(w)}: expected (inputs, outputs)")
    if b is not None and jnp.shape(b) != jnp.shape(w)[1:]:
        raise InputError(
            f"w has shape {jnp.shape(w)}: expected b of shape {jnp.shape(w)[1:]}, but"
            f" b has shape {jnp.shape(b)}"
        )
    y = _matmul(x, w, client, options)
    return y if b is None else y + jnp.asarray(b).astype(y.dtype)


def _matmul(x: Any, w: Any, client: Client, options: ProductOptions) -> jax.Array:
    if not isinstance(client, Client):
        raise InputError(
            f"client is a {type(client).__qualname__}: expected the gradwire.Client"
            " that connect returns"
        )
    # Here, rather than in a callback.
    wire_dtype = parse_options(**options).wire_dtype
    x, w = jnp.asarray(x), jnp.asarray(w)
    if x.dtype != w.dtype or x.dtype.name not in _DTYPES:
        raise InputError(
            f"x is {x.dtype.name} and w {w.dtype.name}: expected one dtype of"
            f" {', '.join(_DTYPES)}"
        )
    if wire_dtype not in (None, *Dtype.named(x.dtype.name).travels_as):
        raise InputError(
            f"x is {x.dtype.name}, but wire_dtype is for float32 operands: omit it"
        )
    division = Broadcast.of({Matrix.X: x.shape, Matrix.W: w.shape})
    route = Route(weakref.ref(client), tuple(sorted(options.items())))
    operands = {"x": _rows(division, x), "w": _columns(division, w)}
    (y,) = products(route, ("y",), operands)
    return _result(division, y)


_DTYPES = tuple(dtype.label for dtype in Dtype)


# JAX transposes and sums what these do, so that the products themselves have one kind
# of batch dimension: those with a job for each index.


def _rows(division: Broadcast, x: jax.Array) -> jax.Array:
    """Return X with shape (loop..., rows, n)."""
    x = x.reshape(*division.x_batch, division.m, division.n)
    order = (*division.loop_axes, *division.column_axes, *division.row_axes)
    x = x.transpose(*order, x.ndim - 2, x.ndim - 1)
    return x.reshape(*division.loop, division.rows, division.n)


def _columns(division: Broadcast, w: jax.Array) -> jax.Array:
    """Return W with shape (loop..., n, columns)."""
    w = w.reshape(*division.w_batch, division.n, division.k)
    order = (*division.loop_axes, *division.row_axes, w.ndim - 2, *division.column_axes)
    w = w.transpose(*order, w.ndim - 1)
    return w.reshape(*division.loop, division.n, division.columns)


def _result(division: Broadcast, y: jax.Array) -> jax.Array:
    """Return Y, of shape (loop..., rows, columns), with the shape of the product."""
    m, last = len(division.batch), len(division.batch) + 1
    loop, rows, columns = division.loop_axes, division.row_axes, division.column_axes
    # Which dimension of Y each one is.
    order = (*loop, *rows, m, *columns, last)
    sizes = (*division.batch, division.m, division.k)
    y = y.reshape([sizes[each] for each in order])
    y = y.transpose([order.index(each) for each in range(last + 1)])
    return y.reshape(division.shapes[Matrix.Y])
