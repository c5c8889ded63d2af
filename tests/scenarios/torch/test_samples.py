"""PyTorch's own samples of its products give PyTorch's results and derivatives."""

from __future__ import annotations

import functools
import sys
import types
import unittest
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as everywhere

import gradwire
import gradwire.torch
from tests.scenarios.torch.test_products import (
    DTYPES,
    assert_close,
    assert_rounded_twice,
    compare,
)

# Loading the samples alone takes ten seconds.
pytestmark = pytest.mark.big


@functools.cache
def operators() -> dict[str, Any]:
    """What PyTorch tests its products with, by name."""
    # Its tests need this package, its samples do not.
    stand_in = types.ModuleType("expecttest")
    stand_in.TestCase = unittest.TestCase  # type: ignore[attr-defined]
    sys.modules.setdefault("expecttest", stand_in)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samples_of = pytest.importorskip(
            "torch.testing._internal.common_methods_invocations", exc_type=ImportError
        )
    return {each.name: each for each in samples_of.op_db if not each.variant_test_name}


def samples(name: str, dtype: torch.dtype) -> list[Any]:
    return list(operators()[name].sample_inputs("cpu", dtype, requires_grad=True))


def addmm(
    product: Callable[..., torch.Tensor],
    bias: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> torch.Tensor:
    return beta * bias + alpha * product(x, w)


def ours(name: str, client: gradwire.Client) -> Callable[..., torch.Tensor]:
    """The operator with its product on a server."""
    matmul = functools.partial(gradwire.torch.matmul, client=client)
    return {
        "mm": matmul,
        "matmul": matmul,
        "nn.functional.linear": functools.partial(gradwire.torch.linear, client=client),
        "addmm": functools.partial(addmm, matmul),
    }[name]


THEIRS: dict[str, Callable[..., torch.Tensor]] = {
    "mm": torch.mm,
    "matmul": torch.matmul,
    "nn.functional.linear": F.linear,
    "addmm": torch.addmm,
}
COUNTS = {"mm": 3, "matmul": 5, "nn.functional.linear": 18, "addmm": 6}
"""At least so many samples are taken. What is refused has a W that is no matrix."""


def is_refused(name: str, sample: Any) -> bool:
    return name == "matmul" and sample.args[0].ndim != 2


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sample_gives_torchs_results_and_gradients(
    client: gradwire.Client, name: str, dtype: torch.dtype
) -> None:
    function, theirs, compared = ours(name, client), THEIRS[name], 0
    if name == "addmm" and dtype in DTYPES[2:]:  # each term is rounded
        theirs = functools.partial(addmm, torch.mm)
    for sample in samples(name, dtype):
        if is_refused(name, sample):
            with pytest.raises(gradwire.InputError, match="exactly two"):
                function(sample.input, *sample.args)
            continue
        compare(
            functools.partial(function, **sample.kwargs),
            functools.partial(theirs, **sample.kwargs),
            sample.input,
            *sample.args,
        )
        compared += 1
    assert compared >= COUNTS[name]


@pytest.mark.parametrize("name", THEIRS)
def test_a_sample_has_right_first_and_second_derivatives(
    client: gradwire.Client, name: str
) -> None:
    function, checked = ours(name, client), 0
    for sample in samples(name, torch.float64):
        if is_refused(name, sample):
            continue
        inputs = (sample.input, *sample.args)
        once = functools.partial(function, **sample.kwargs)
        assert torch.autograd.gradcheck(once, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(once, inputs, fast_mode=True)
        checked += 1
    assert checked >= COUNTS[name]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_client_takes_the_batches_and_vectors_that_are_refused(
    client: gradwire.Client, dtype: torch.dtype
) -> None:
    compared = 0
    for sample in samples("matmul", dtype):
        if not is_refused("matmul", sample):
            continue
        x, w = sample.input, sample.args[0]
        y = torch.matmul(x, w)
        dy = torch.randn_like(y)
        found = client.gradients(x.detach(), w.detach(), dy)
        same = assert_close if dtype in DTYPES[:2] else assert_rounded_twice
        for one, other in zip(
            (found.y, found.dx, found.dw),
            (y, *torch.autograd.grad(y, (x, w), dy)),
            strict=True,
        ):
            assert one.shape == other.shape
            assert one.dtype == other.dtype
            same(one, other.detach())
        compared += 1
    assert compared >= 10
