"""Products on a server as differentiable functions, without a session."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping
from typing import Any, TypedDict, Unpack

import torch

from gradwire._api.errors import ClientStateError, InputError
from gradwire._api.options import DtypeLike, check_names
from gradwire._api.verify import Verify
from gradwire._client._sync.client import Client
from gradwire.torch._compiling import uncompiled
from gradwire.torch._operators import NO_FORWARD_MODE, define

NAMES = ("y", "dx", "dw")

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class ProductOptions(TypedDict, total=False):
    """The options of `linear` and `matmul`, as for `Client.gradients`."""

    wire_dtype: DtypeLike
    dw_accumulator: DtypeLike
    allow_tf32: bool
    checksum: bool
    verify: bool | int | Verify | None
    timeout_s: float | None


def linear(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    client: Client,
    **options: Unpack[ProductOptions],
) -> torch.Tensor:
    """Compute y = x wᵀ + bias on a server, as `torch.nn.functional.linear`.

    The function is differentiable any number of times, and only what autograd needs is
    computed: one job forward, one job backward. Each sends its operands; a `Linear`,
    whose weight stays on the server, sends less. Autocast, `torch.func` and
    `torch.compile` are supported. With ``fullgraph=True``, the first call with a client
    must not be a compiled one. Forward-mode derivatives are not supported.

    Args:
        x: Shape (..., in_features).
        w: Shape (out_features, in_features).
        bias: Shape (out_features,). It is added here.
        client: The client that computes.
        **options: `wire_dtype`, `dw_accumulator`, `allow_tf32`, `checksum`, `verify`
            and `timeout_s`, as for `Client.gradients`.

    Returns:
        Shape (..., out_features), with the dtype and the device of x.

    Raises:
        InputError: An argument is invalid.
        GradwireError: The job failed.

    Example:
        >>> y = gradwire.torch.linear(x, w, bias, client=client)
        >>> y.sum().backward()
    """
    check_names("linear", options, ProductOptions)
    x, w = _operands(x, w)
    if x.shape[-1] != w.shape[1]:
        raise InputError(
            f"x has shape {tuple(x.shape)} and w {tuple(w.shape)}: x's columns must"
            " equal w's columns"
        )
    rows = x if x.ndim > 1 else x.unsqueeze(0)
    # x wᵀ is the dX of a job with W = w and dY = x: nothing is transposed.
    route = _route(client, options)
    (y,) = _applied(None, w, rows, (False, True, False), route)
    y = y if x.ndim > 1 else y.squeeze(0)
    return y if bias is None else y + bias.to(y.dtype)


def matmul(
    x: torch.Tensor,
    w: torch.Tensor,
    *,
    client: Client,
    **options: Unpack[ProductOptions],
) -> torch.Tensor:
    """Compute y = x w on a server, as `torch.matmul` with a matrix w.

    Args:
        x: Shape (..., n).
        w: Shape (n, k).
        client: The client that computes.
        **options: As for `linear`.

    Returns:
        Shape (..., k), with the dtype and the device of x.

    Raises:
        InputError: An argument is invalid.
        GradwireError: The job failed.

    Example:
        >>> y = gradwire.torch.matmul(x, w, client=client)
    """
    check_names("matmul", options, ProductOptions)
    x, w = _operands(x, w)
    if x.shape[-1] != w.shape[0]:
        raise InputError(
            f"x has shape {tuple(x.shape)} and w {tuple(w.shape)}: x's columns must"
            " equal w's rows"
        )
    rows = x if x.ndim > 1 else x.unsqueeze(0)
    route = _route(client, options)
    (y,) = _applied(rows, w, None, (True, False, False), route)
    return y if x.ndim > 1 else y.squeeze(0)


def autocast(x: torch.Tensor) -> torch.dtype | None:
    """Return the dtype to which autocast casts x; None: it is left alone."""
    kind = x.device.type
    # A tensor on meta has no autocast, and no elements: it is refused as an operand.
    # (PyTorch 2.6 cannot compile is_autocast_available.)
    if x.dtype in DTYPES[:3] and not x.is_meta and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def _operands(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Check and cast operands, as a product of PyTorch does.

    Raises:
        InputError: They cannot be multiplied.
    """
    for name, value in (("x", x), ("w", w)):
        if not isinstance(value, torch.Tensor):
            raise InputError(
                f"{name} is a {type(value).__qualname__}: expected a tensor"
            )
    if x.ndim < 1 or w.ndim != 2:
        raise InputError(
            f"x has shape {tuple(x.shape)} and w {tuple(w.shape)}: expected at least"
            " one dimension and exactly two"
        )
    if x.device != w.device:
        raise InputError(f"x is on {x.device} and w on {w.device}: expected one device")
    to = autocast(x)
    if to is not None and autocast(w) is not None:
        x, w = x.to(to), w.to(to)
    if x.dtype != w.dtype or x.dtype not in DTYPES:
        raise InputError(
            f"x is {x.dtype} and w {w.dtype}: expected one dtype of"
            f" {', '.join(map(str, DTYPES))}"
        )
    return x, w


class Products(torch.autograd.Function):
    """Any of Y = X W, dX = dY Wᵀ and dW = Xᵀ dY, of the operands that they need.

    The derivatives of these three are products of the same three kinds, so the function
    is its own derivative's building block, to any order.
    """

    @staticmethod
    def forward(
        x: torch.Tensor | None,
        w: torch.Tensor | None,
        dy: torch.Tensor | None,
        wanted: tuple[bool, bool, bool],
        route: int,
    ) -> tuple[torch.Tensor, ...]:
        """Return the wanted results, in order."""
        return tuple(_products(x, w, dy, *wanted, route))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
        """Keep what `backward` needs."""
        x, w, dy, ctx.wanted, ctx.route = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, w, dy)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        """Return the gradients of the operands."""
        x, w, dy = ctx.saved_tensors
        needs_x, needs_w, needs_dy = ctx.needs_input_grad[:3]
        left = list(gradients)
        of_y, of_dx, of_dw = (left.pop(0) if each else None for each in ctx.wanted)
        to_x: list[Any] = []
        to_w: list[Any] = []
        to_dy: list[Any] = []
        # Each result is a product of two operands. Its gradient takes its place in a
        # job with them, and the gradients of the two are that job's other results.
        if of_y is not None:
            _add(ctx, x, w, of_y, (None, needs_x, needs_w), (None, to_x, to_w))
        if of_dx is not None:
            _add(ctx, of_dx, w, dy, (needs_dy, None, needs_w), (to_dy, None, to_w))
        if of_dw is not None:
            _add(ctx, x, of_dw, dy, (needs_dy, needs_x, None), (to_dy, to_x, None))
        return (_sum(to_x), _sum(to_w), _sum(to_dy), None, None)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        x: torch.Tensor | None,
        w: torch.Tensor | None,
        dy: torch.Tensor | None,
        wanted: tuple[bool, bool, bool],
        route: int,
    ) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...]]:
        """Compute a batch: with one W and no dW, its rows are those of one job."""
        operands: list[Any] = [x, w, dy]
        for index, dim in enumerate(in_dims[:3]):
            if dim is not None:
                operands[index] = operands[index].movedim(dim, 0)
        batched = [dim is not None for dim in in_dims[:3]]
        zeros = (0,) * sum(wanted)
        if not batched[1] and not wanted[2]:
            for index in (0, 2):
                each = operands[index]
                if each is not None and not batched[index]:
                    operands[index] = each.expand(info.batch_size, *each.shape)
            return _applied(*operands, wanted, route), zeros
        results = [
            _applied(
                *(
                    each[index] if has else each
                    for each, has in zip(operands, batched, strict=True)
                ),
                wanted,
                route,
            )
            for index in range(info.batch_size)
        ]
        return tuple(torch.stack(each) for each in zip(*results, strict=True)), zeros


def _applied(*inputs: Any) -> tuple[torch.Tensor, ...]:
    """Return the wanted results, in order.

    Args:
        *inputs: Those of `Products.forward`.

    Raises:
        NotImplementedError: A forward-mode derivative is wanted.
    """
    results: tuple[torch.Tensor, ...]
    if torch.compiler.is_compiling():
        results = Products.apply(*inputs)
        return results
    # PyTorch calls `jvp` where a tangent would be needed, and not where there is none.
    # A `jvp` of Products could not refuse: torch.compile takes no function with one.
    try:
        results = Products.apply(*inputs)
    except NotImplementedError as error:
        if "forward mode" not in str(error):
            raise
        raise NotImplementedError(NO_FORWARD_MODE) from None
    return results


def _add(
    ctx: Any,
    x: Any,
    w: Any,
    dy: Any,
    wanted: tuple[bool | None, bool | None, bool | None],
    sums: tuple[list[Any] | None, ...],
) -> None:
    """Compute the wanted results of a job and append each to its sum."""
    y, dx, dw = (bool(each) for each in wanted)
    if not (y or dx or dw):
        return
    results = _applied(
        x if y or dw else None,
        w if y or dx else None,
        dy if dx or dw else None,
        (y, dx, dw),
        ctx.route,
    )
    left = list(results)
    for each, terms in zip((y, dx, dw), sums, strict=True):
        if each and terms is not None:
            terms.append(left.pop(0))


def _sum(terms: list[Any]) -> Any:
    if not terms:
        return None
    total = terms[0]
    for each in terms[1:]:
        total = total + each
    return total


def _compute(
    x: torch.Tensor | None,
    w: torch.Tensor | None,
    dy: torch.Tensor | None,
    y: bool,
    dx: bool,
    dw: bool,
    route: int,
) -> list[torch.Tensor]:
    client, options = _routes[route]
    connected = client()
    if connected is None:
        raise ClientStateError("the client of this product no longer exists")
    results = _empty(x, w, dy, y, dx, dw, route)
    names = [name for name, each in zip(NAMES, (y, dx, dw), strict=True) if each]
    out = dict(zip(names, results, strict=True))
    connected.gradients(x, w, dy, results=names, out=out, **options)
    return results


def _empty(
    x: Any, w: Any, dy: Any, y: bool, dx: bool, dw: bool, route: int
) -> list[torch.Tensor]:
    shapes = []
    if y:
        shapes.append((*x.shape[:-1], w.shape[1]))
    if dx:
        shapes.append((*dy.shape[:-1], w.shape[0]))
    if dw:
        shapes.append((x.shape[-1], dy.shape[-1]))
    like = w if x is None else x
    return [like.new_empty(shape) for shape in shapes]


# By its number of a route: a compiled graph can hold no client.
_products = define(
    "products(Tensor? x, Tensor? w, Tensor? dy, bool y, bool dx, bool dw, int route)"
    " -> Tensor[]",
    _compute,
    _empty,
)


_routes: dict[int, tuple[weakref.ref[Client], Mapping[str, Any]]] = {}
"""Clients and options, by the number that stands for them in graphs."""

_numbers: dict[Any, int] = {}

_new_number = itertools.count(1)


def _route(client: Client, options: Mapping[str, Any]) -> int:
    """Return the number of a client with options."""
    number = _numbers.get((id(client), tuple(sorted(options.items()))))
    return _registered(client, options) if number is None else number


@uncompiled
def _registered(client: Client, options: Mapping[str, Any]) -> int:
    if not isinstance(client, Client):
        raise InputError(
            f"client is a {type(client).__qualname__}: expected the gradwire.Client"
            " that connect returns"
        )
    key = (id(client), tuple(sorted(options.items())))
    number = next(_new_number)
    _routes[number] = (weakref.ref(client), dict(options))
    _numbers[key] = number
    weakref.finalize(client, _forget, key, number)
    return number


def _forget(key: Any, number: int) -> None:
    # Another client may have the same id later.
    _numbers.pop(key, None)
    _routes.pop(number, None)
