"""Layers on a server are part of the graphs that `torch.compile` makes."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import gradwire
import gradwire.torch
from tests.scenarios.torch.models import (
    assert_same_weights,
    both,
    mse,
    regression,
    train,
)

# Of PyTorch itself, when its second compiler is loaded.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

ADAMW = torch.optim.AdamW

# The second compiles C++ code, which takes seconds.
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.big)]


@pytest.fixture
def compilers() -> Iterator[None]:
    """No graph of another test, and none left to others."""
    torch.compiler.reset()
    with torch._functorch.config.patch(donated_buffer=False):
        yield
    torch.compiler.reset()


@pytest.mark.usefixtures("compilers")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_model_trains_as_here(
    session: gradwire.Session, backend: str
) -> None:
    local, remote = both(
        nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)), session
    )
    compiled = torch.compile(remote, backend=backend, fullgraph=True)
    batches = [regression() for _ in range(5)]

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return mse(compiled if model is remote else model, batch)

    expected = train(local, ADAMW, batches, loss, lr=0.01)
    losses = train(remote, ADAMW, batches, loss, lr=0.01)
    for one, other in zip(losses, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert_same_weights(local, remote)


@pytest.mark.usefixtures("compilers")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["once", "retained", "inputs alone", "checkpointed"])
def test_gradients_of_a_compiled_model_are_torchs(
    session: gradwire.Session, backend: str, how: str
) -> None:
    local, remote = both(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), session)
    x = torch.randn(4, 16, requires_grad=True)

    def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if how == "checkpointed":
            return checkpoint(model, x, use_reentrant=False).sin().sum()
        return model(x).sin().sum()

    found = []
    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    for value in (loss(local, x), compiled(remote, x)):
        if how == "inputs alone":
            found.append(torch.autograd.grad(value, x)[0])
            continue
        x.grad = None
        value.backward(retain_graph=how == "retained")
        if how == "retained":
            value.backward()
        found.append(x.grad)
    torch.testing.assert_close(*found)
    for one, other in zip(local, remote, strict=True):
        expected = torch.zeros(16, 16) if one.weight.grad is None else one.weight.grad
        torch.testing.assert_close(other.weight.fetch_gradient(), expected)


@pytest.mark.usefixtures("compilers")
def test_one_compiled_graph_serves_the_layers_of_a_model(
    session: gradwire.Session,
) -> None:
    # It loads the compiler, for two seconds of each process that collects tests.
    from torch._dynamo.testing import CompileCounterWithBackend

    _, remote = both(nn.Sequential(*(nn.Linear(16, 16) for _ in range(12))), session)
    counter = CompileCounterWithBackend("aot_eager")
    for layer in remote:
        layer.compile(backend=counter, fullgraph=True)
    remote(torch.randn(4, 16, requires_grad=True)).sum().backward()
    assert counter.frame_count == 1


@pytest.mark.usefixtures("compilers")
def test_a_compiled_graph_that_is_dropped_leaves_nothing(
    session: gradwire.Session,
) -> None:
    _, remote = both(nn.Linear(16, 16), session)
    opt = gradwire.torch.optimizer(remote, ADAMW)
    compiled = torch.compile(remote, backend="aot_eager", fullgraph=True)
    compiled(torch.randn(4, 16))
    gc.collect()
    opt.step()
    assert "activation" not in [each.role for each in session.describe().tensors]


@pytest.mark.usefixtures("compilers")
def test_second_derivatives_are_refused_in_compiled_code(
    session: gradwire.Session,
) -> None:
    _, remote = both(nn.Linear(16, 16), session)
    x = torch.randn(4, 16, requires_grad=True)
    compiled = torch.compile(remote, backend="aot_eager", fullgraph=True)
    (dx,) = torch.autograd.grad(compiled(x).sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="not currently support double"):
        dx.square().sum().backward()


def duals(function: Any, x: torch.Tensor) -> Any:
    """The derivative in the direction of x, without `torch.func`."""
    with torch.no_grad(), forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, x))).tangent


@pytest.mark.usefixtures("compilers")
@pytest.mark.parametrize(
    "backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.big)]
)
@pytest.mark.parametrize(
    "of", ["layer", pytest.param("frozen layer", marks=pytest.mark.big), "product"]
)
@pytest.mark.parametrize(
    "transform",
    [
        pytest.param(lambda f: lambda x: torch.func.jvp(f, (x,), (x,))[1], id="jvp"),
        pytest.param(
            lambda f: torch.func.grad(lambda x: f(x).sin().sum()),
            id="grad",
            marks=pytest.mark.big,
        ),
        pytest.param(torch.func.jacfwd, id="jacfwd", marks=pytest.mark.big),
        pytest.param(torch.func.vmap, id="vmap", marks=pytest.mark.big),
        pytest.param(None, id="dual tensors"),
    ],
)
# The compilers' own errors are of many kinds, and some warn before.
@pytest.mark.filterwarnings("ignore")
def test_transforms_in_compiled_code_are_right_or_refused(
    session: gradwire.Session,
    client: gradwire.Client,
    backend: str,
    of: str,
    transform: Any,
) -> None:
    local, remote = both(nn.Linear(16, 16, bias=False), session)
    if of == "frozen layer":
        remote.requires_grad_(False)

    def product(x: torch.Tensor) -> torch.Tensor:
        return gradwire.torch.linear(x, local.weight.detach(), client=client)

    function = product if of == "product" else remote
    x = torch.randn(4, 16)
    try:
        if transform is None:
            found = duals(torch.compile(function, backend=backend), x)
        else:
            found = torch.compile(transform(function), backend=backend)(x)
    except Exception:  # noqa: BLE001  # the compilers have errors of all kinds
        return
    assert transform is not None
    torch.testing.assert_close(found, transform(local)(x))
