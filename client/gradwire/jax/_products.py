"""Any of Y = X W, dX = dY Wᵀ and dW = Xᵀ dY as an operation that JAX transforms.

The operands are matrices, or stacks of equally many: x (loop..., m, n), w (loop..., n,
k) and dy (loop..., m, k), with a job for each index of `loop`.

A `jax.custom_vjp` would see too little: under `jax.grad` of a `jax.vmap`, its backward
pass has to return dW of each example, which JAX then adds up. So the products are
primitives of JAX, with rules for their derivatives and for batches. A batch becomes
rows before anything is differentiated, and dW of all of them is one result of one job.

Each result is linear in both of its factors, and derivatives of the three products are
products of the same three kinds. So derivatives of any order and mode are computed.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from gradwire.jax._job import Job, Operands, Results, Route, shapes_of

_FACTORS = {"y": ("x", "w"), "dx": ("dy", "w"), "dw": ("x", "dy")}
"""The two operands of each result."""

_PLACE = {"y": "dy", "dx": "x", "dw": "w"}
"""The operand that has the shape of each result, and is its gradient in a job."""

_GRADIENT = {"x": "dx", "w": "dw", "dy": "y"}
"""The result that has the shape of each operand."""

_FREE = {
    ("y", "x"): (-2, -2),
    ("y", "w"): (-1, -1),
    ("dx", "dy"): (-2, -2),
    ("dx", "w"): (-2, -1),
    ("dw", "x"): (-1, -2),
    ("dw", "dy"): (-1, -1),
}
"""The axis of an operand that is not summed over, and the axis of the result that it
becomes."""


def products(route: Route, results: Results, operands: Operands) -> list[jax.Array]:
    """Compute results of a product.

    Args:
        route: Who computes.
        results: The names of the wanted results.
        operands: By name, those that the results need, and maybe others.

    Returns:
        The results, in the order of `results`.
    """
    needed = {name for result in results for name in _FACTORS[result]}
    names = tuple(name for name in ("x", "w", "dy") if name in needed)
    arrays = [operands[name] for name in names]
    if any(map(_varies, arrays)):
        raise NotImplementedError(
            "gradwire.jax does not say which results vary over the axes of a mesh: pass"
            " check_vma=False to jax.shard_map"
        )
    bound: list[jax.Array] = _products_p.bind(
        *arrays, route=route, results=results, names=names
    )
    return bound


def _varies(array: jax.Array) -> bool:
    """Return whether JAX tracks over which axes of a mesh an array varies.

    It takes results of callbacks for equal on all devices then, and would not sum the
    gradients of an operand that is.
    """
    aval = jax.typeof(array)
    axes = getattr(aval, "vma", None) or getattr(
        getattr(aval, "manual_axis_type", None), "varying", None
    )
    return bool(axes)


_products_p = Primitive("gradwire_products")
_products_p.multiple_results = True


def _call(
    *arrays: jax.Array, route: Route, results: Results, names: tuple[str, ...]
) -> Any:
    shapes = shapes_of(results, dict(zip(names, arrays, strict=True)))
    # vmap does not reach the callback.
    callback = Job(route, results, names)
    return jax.pure_callback(callback, shapes, *arrays, vmap_method="sequential")


_products_p.def_impl(_call)
mlir.register_lowering(_products_p, mlir.lower_fun(_call, multiple_results=True))


@_products_p.def_abstract_eval
def _products_avals(
    *avals: Any, results: Results, names: tuple[str, ...], **_: Any
) -> list[Any]:
    shapes = shapes_of(results, dict(zip(names, avals, strict=True)))
    return [jax.core.ShapedArray(each.shape, each.dtype) for each in shapes]


# The tangent of a result, of which one or both factors have tangents. It is one
# operation, so that its transpose is one job for both gradients.
_tangent_p = Primitive("gradwire_tangent")
_tangent_p.multiple_results = True


def _products_jvp(
    primals: Sequence[Any],
    tangents: Sequence[Any],
    *,
    route: Route,
    results: Results,
    names: tuple[str, ...],
) -> tuple[Any, Any]:
    given = dict(zip(names, primals, strict=True))
    moving = {
        name: tangent
        for name, tangent in zip(names, tangents, strict=True)
        if not isinstance(tangent, ad.Zero)
    }
    values = products(route, results, given)
    outs = []
    for result, value in zip(results, values, strict=True):
        factors = _FACTORS[result]
        moved = tuple(name for name in factors if name in moving)
        if not moved:
            outs.append(ad.Zero.from_primal_value(value))
            continue
        fixed = tuple(_other(result, name) for name in moved)
        (out,) = _tangent_p.bind(
            *(moving[name] for name in moved),
            *(given[name] for name in fixed),
            route=route,
            result=result,
            moved=moved,
        )
        outs.append(out)
    return values, outs


ad.primitive_jvps[_products_p] = _products_jvp


def _other(result: str, factor: str) -> str:
    (other,) = (name for name in _FACTORS[result] if name != factor)
    return other


def _terms(result: str, moved: tuple[str, ...], arrays: Sequence[Any]) -> list[Any]:
    """Return the products whose sum is a tangent, by their operands.

    `arrays` are the tangents of the factors `moved`, and the other factor of each.
    """
    half = len(moved)
    return [
        {name: tangent, _other(result, name): fixed}
        for name, tangent, fixed in zip(
            moved, arrays[:half], arrays[half:], strict=True
        )
    ]


def _tangent(
    *arrays: jax.Array, route: Route, result: str, moved: tuple[str, ...]
) -> list[jax.Array]:
    terms = _terms(result, moved, arrays)
    values = [products(route, (result,), operands)[0] for operands in terms]
    return [reduce(operator.add, values)]


_tangent_p.def_impl(_tangent)
mlir.register_lowering(_tangent_p, mlir.lower_fun(_tangent, multiple_results=True))


@_tangent_p.def_abstract_eval
def _tangent_avals(
    *avals: Any, result: str, moved: tuple[str, ...], **_: Any
) -> list[Any]:
    (shape,) = shapes_of((result,), _terms(result, moved, avals)[0])
    return [jax.core.ShapedArray(shape.shape, shape.dtype)]


def _tangent_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], **params: Any
) -> tuple[Any, Any]:
    whole = [
        jnp.zeros_like(primal) if isinstance(tangent, ad.Zero) else tangent
        for primal, tangent in zip(primals, tangents, strict=True)
    ]
    value, out = jax.jvp(partial(_tangent, **params), tuple(primals), tuple(whole))
    return value, out


ad.primitive_jvps[_tangent_p] = _tangent_jvp


def _tangent_transpose(
    gradients: Sequence[Any],
    *arrays: Any,
    route: Route,
    result: str,
    moved: tuple[str, ...],
) -> list[Any]:
    (gradient,) = gradients
    half = len(moved)
    if isinstance(gradient, ad.Zero):
        zeros = [ad.Zero(each.aval) for each in arrays[:half]]
        return [*zeros, *[None] * half]
    fixed = {
        _other(result, name): each
        for name, each in zip(moved, arrays[half:], strict=True)
    }
    # The gradient takes the result's place in a job with its factors, and the gradients
    # of these are that job's other results.
    wanted = tuple(_GRADIENT[name] for name in moved)
    return [
        *products(route, wanted, {**fixed, _PLACE[result]: gradient}),
        *[None] * half,
    ]


ad.primitive_transposes[_tangent_p] = _tangent_transpose


def _products_transpose(
    gradients: Sequence[Any],
    *arrays: Any,
    route: Route,
    results: Results,
    names: tuple[str, ...],
) -> list[Any]:
    """Transpose a term of a tangent, which is linear in one of its factors."""
    (result,) = results
    (moved,) = (
        name
        for name, array in zip(names, arrays, strict=True)
        if ad.is_undefined_primal(array)
    )
    given = dict(zip(names, arrays, strict=True))
    order = given[moved], given[_other(result, moved)]
    (gradient, _) = _tangent_transpose(
        gradients, *order, route=route, result=result, moved=(moved,)
    )
    return [gradient if name == moved else None for name in names]


ad.primitive_transposes[_products_p] = _products_transpose


def _to_front(arrays: Sequence[Any], axes: Sequence[int | None]) -> list[Any]:
    return [
        array if axis is None else jnp.moveaxis(array, axis, 0)
        for array, axis in zip(arrays, axes, strict=True)
    ]


def _products_batched(
    arrays: Sequence[Any],
    axes: Sequence[int | None],
    *,
    route: Route,
    results: Results,
    names: tuple[str, ...],
) -> tuple[list[Any], list[int | None]]:
    operands = dict(zip(names, _to_front(arrays, axes), strict=True))
    batched = {name for name, axis in zip(names, axes, strict=True) if axis is not None}
    values = _batched(route, results, operands, batched)
    outs: list[int | None] = [
        0 if batched & set(_FACTORS[result]) else None for result in results
    ]
    return values, outs


batching.primitive_batchers[_products_p] = _products_batched


def _tangent_batched(
    arrays: Sequence[Any],
    axes: Sequence[int | None],
    *,
    route: Route,
    result: str,
    moved: tuple[str, ...],
) -> tuple[list[Any], list[int]]:
    values = []
    has_batch = [axis is not None for axis in axes]
    terms = _terms(result, moved, _to_front(arrays, axes))
    for operands, has in zip(terms, _terms(result, moved, has_batch), strict=True):
        batched = {name for name in operands if has[name]}
        (value,) = _batched(route, (result,), operands, batched)
        values.append(value if batched else value[None])
    return [reduce(operator.add, values)], [0]


batching.primitive_batchers[_tangent_p] = _tangent_batched


def _batched(
    route: Route, results: Results, operands: Operands, batched: set[str]
) -> list[jax.Array]:
    """Compute a batch.

    Args:
        route: Who computes.
        results: The wanted results.
        operands: The operands that they need, and maybe others.
        batched: The names of those that have a leading dimension, which is the batch.

    Returns:
        The results, with that dimension if a factor of them has it.
    """
    factors = {name for result in results for name in _FACTORS[result]}
    if len(results) > 1 and not factors <= batched:
        each = (_batched(route, (result,), operands, batched) for result in results)
        return [value for (value,) in each]
    if factors <= batched or not factors & batched:
        return products(route, results, operands)
    # One of two factors: the batch lengthens an axis that is not summed over.
    (result,) = results
    (name,) = factors & batched
    axis, to = _FREE[result, name]
    array = operands[name]
    size, free = array.shape[0], array.shape[axis]
    array = jnp.moveaxis(array, 0, axis - 1)
    shape = list(array.shape)
    at = array.ndim + axis
    shape[at - 1 : at + 1] = [size * free]
    (long,) = products(route, results, {**operands, name: array.reshape(shape)})
    shape = list(long.shape)
    at = long.ndim + to
    shape[at : at + 1] = [size, free]
    return [jnp.moveaxis(long.reshape(shape), to - 1, 0)]
