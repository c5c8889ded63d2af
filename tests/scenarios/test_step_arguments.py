"""A step that is given wrong tensors says which of them, and what it expects."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import gradwire
from tests.support.serving import ServerProcess

SGD = gradwire.SGD()
ONES = np.ones((3, 2), np.float32)
NEVER_SENT, REFUSED = gradwire.InputError, gradwire.RequestError

W = "<gradwire.Tensor 'fc1' (3, 2) float32>"
OTHER = "<gradwire.Tensor 'fc2' (3, 2) float32>"
G = "<gradwire.Tensor 'fc1.grad' (3, 2) float32>"
X = "<gradwire.Tensor (4, 3) float32>"

WRONG: list[tuple[type[gradwire.GradwireError], str, Callable[..., Any]]] = [
    (
        NEVER_SENT,
        f"a gradient in gradients is {W}, a weight: expected a gradient, as returned by"
        " zeros_like",
        lambda w, **_: [{w: w}],
    ),
    (
        NEVER_SENT,
        f"a weight in gradients is {G}, a gradient: expected a weight, as returned by"
        " put",
        lambda w, g, **_: [{g: w}],
    ),
    (
        NEVER_SENT,
        f"a weight in gradients is {G}, a gradient",
        lambda g, other_g, **_: [{g: other_g}],
    ),
    (
        NEVER_SENT,
        f"a gradient in gradients is {OTHER}, a weight",
        lambda w, other, **_: [{w: other}],
    ),
    (
        NEVER_SENT,
        f"a gradient in more[0] is {X}, an X that forward has kept",
        lambda w, g, other, x, **_: [{w: g}, {other: x}],
    ),
    (
        NEVER_SENT,
        "a gradient in gradients is a ndarray: expected a tensor of this session",
        lambda w, **_: [{w: ONES}],
    ),
    (
        NEVER_SENT,
        f"a weight in more[1] is {W}, which the step names twice",
        lambda w, g, other, other_g, **_: [{w: g}, {}, {w: other_g}],
    ),
    (
        NEVER_SENT,
        f"a gradient in gradients is {G}, which the step names twice",
        lambda w, g, other, **_: [{w: g, other: g}],
    ),
    (
        NEVER_SENT,
        f"the weight is {W} and its gradient <gradwire.Tensor 'wide.grad' (3, 5)"
        " float32>: expected one shape",
        lambda w, wide_g, **_: [{w: wide_g}],
    ),
    (
        NEVER_SENT,
        "gradients is empty: expected at least one weight",
        lambda **_: [{}, {}],
    ),
    (
        REFUSED,
        "a weight in more[0] is <gradwire.Tensor 'base' (3, 2) float32>, which is"
        " frozen: put it again without frozen (TENSOR_MISMATCH)",
        lambda w, g, base, other_g, **_: [{w: g}, {base: other_g}],
    ),
    (
        REFUSED,
        "a gradient in gradients is <gradwire.Tensor 'double' (3, 2) float64>, of shape"
        " (3, 2) and float64: expected a gradient of shape (3, 2) and float32",
        lambda w, g, other, double, **_: [{w: g, other: double}],
    ),
    (
        REFUSED,
        "a gradient in gradients is <gradwire.Tensor 'gone' (3, 2) float32>: the"
        " session has no tensor",
        lambda w, gone, **_: [{w: gone}],
    ),
]


@pytest.mark.parametrize(("error", "message", "groups"), WRONG)
def test_wrong_tensors_are_named_by_what_the_caller_calls_them(
    client: gradwire.Client,
    error: type[gradwire.GradwireError],
    message: str,
    groups: Callable[..., Any],
) -> None:
    with client.session("1MiB") as session:
        w, other = session.put(ONES, name="fc1"), session.put(ONES, name="fc2")
        tensors = {
            "w": w,
            "g": session.zeros_like(w),
            "other": other,
            "other_g": session.zeros_like(other),
            "wide_g": session.zeros_like(
                session.put(np.ones((3, 5), "f4"), name="wide")
            ),
            "base": session.put(ONES, name="base", frozen=True),
            "double": session.zeros_like(w, name="double", dtype="float64"),
            "gone": session.zeros_like(w, name="gone"),
            "x": session.forward(np.ones((4, 3), "f4"), w).context.x,
        }
        session.drop(tensors["gone"])
        first, *more = groups(**tensors)
        with pytest.raises(error, match=re.escape(message)) as raised:
            session.step(SGD, first, *((SGD, each) for each in more))
        assert str(raised.value).startswith(message)
        assert session.step_count == 0
        session.step(SGD, {w: tensors["g"]})


async def test_wrong_tensors_of_an_async_session_are_named_too(
    server: ServerProcess,
) -> None:
    async with (
        gradwire.AsyncClient(server.address) as client,
        client.session("1MiB") as session,
    ):
        w = await session.put(ONES, name="fc1")
        base = await session.put(ONES, name="base", frozen=True)
        g = await session.zeros_like(w)
        for error, given, message in (
            (NEVER_SENT, {w: w}, f"a gradient in gradients is {W}, a weight"),
            (REFUSED, {base: g}, f"a weight in gradients is {base!r}, which is frozen"),
        ):
            with pytest.raises(error, match=re.escape(message)):
                await session.step(SGD, given)


def test_a_gradient_that_lacks_a_contribution_is_named(
    client: gradwire.Client,
) -> None:
    x = np.ones((4, 3), np.float32)
    with client.session("1MiB") as session:
        w = session.put(ONES, name="fc1")
        g = session.zeros_like(w)
        # Of a call that was cancelled before it was sent.
        session.contribution(g, {})
        session.backward(session.forward(x, w).context, np.ones((4, 2), "f4"), into=g)
        with pytest.raises(gradwire.RequestError) as raised:
            session.step(SGD, {w: g})
    assert str(raised.value).startswith(
        f"a gradient in gradients, {G}, has no part 0 yet"
    )
    (field,) = raised.value.fields
    assert field == "groups[0].parameters[0].gradient"
    assert raised.value.details.startswith(f"{field} has no part 0 yet")


@pytest.mark.parametrize("name", ["into", "bias_into"])
def test_results_are_added_to_gradients_only(
    client: gradwire.Client, name: str
) -> None:
    with client.session(keep="1MiB") as session:
        w = session.put(ONES, name="fc1")
        _, context = session.forward(np.ones((4, 3), np.float32), w)
        dy = np.ones((4, 2), np.float32)
        for call in (
            lambda: session.backward(context, dy, **{name: w}),
            lambda: session.gradients(ONES.T, w, ONES[:2], **{name: w}),
        ):
            with pytest.raises(gradwire.InputError) as raised:
                call()
            assert str(raised.value) == (
                f"{name} is {W}, a weight: expected a gradient, as returned by"
                " zeros_like"
            )
        assert session.step_count == 0


def test_a_handle_has_the_role_of_its_tensor(client: gradwire.Client) -> None:
    with client.session("1MiB") as session:
        w = session.put(ONES)
        g = session.zeros_like(w.T)
        _, context = session.forward(np.ones((4, 3), "f4"), w)
        assert context is not None
        handles = (w, g, context.x)
        assert [each.role for each in handles] == ["weight", "gradient", "activation"]
        assert [each.role for each in session.describe().tensors] == [
            each.role for each in handles
        ]
