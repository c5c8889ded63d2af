"""`gradwire.torch.linear` and `matmul` are PyTorch's, with all their derivatives."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as everywhere
from torch.autograd import forward_ad

import gradwire
import gradwire.torch
from tests.support.serving import ServerProcess

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def assert_close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected)


def assert_rounded_twice(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare 16-bit results: the product is rounded before the bias is added."""
    if not actual.numel():
        return
    atol = 2 * torch.finfo(actual.dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=max(atol, 1e-5))


def compare(ours: Any, theirs: Any, *inputs: torch.Tensor) -> None:
    """Compare results and gradients."""
    actual, expected = ours(*inputs), theirs(*inputs)
    assert actual.dtype == expected.dtype
    rounded = actual.dtype in DTYPES[2:]
    (assert_rounded_twice if rounded else assert_close)(actual, expected)
    wanted = [each for each in inputs if each.requires_grad]
    if not wanted:
        return
    upstream = torch.randn_like(expected)
    assert_close(
        torch.autograd.grad(actual, wanted, upstream),
        torch.autograd.grad(expected, wanted, upstream),
    )


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 3), (0, 3), (2, 0, 3)])
def test_first_and_second_derivatives_are_those_of_differences(
    client: gradwire.Client, shape: tuple[int, ...]
) -> None:
    def linear(*args: Any) -> Any:
        return gradwire.torch.linear(*args, client=client)

    def matmul(*args: Any) -> Any:
        return gradwire.torch.matmul(*args, client=client)

    for function, inputs in (
        (linear, (double(*shape), double(2, 3), double(2))),
        (matmul, (double(*shape), double(3, 2))),
    ):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_third_derivatives_are_torchs(client: gradwire.Client) -> None:
    def third(product: Any) -> Any:
        x, w = x0.detach().requires_grad_(), w0.detach().requires_grad_()
        found: Any = product(x, w).sin().sum()
        for _ in range(3):
            dx, dw = torch.autograd.grad(found, (x, w), create_graph=True)
            found = (dx**2).sum() + (dw**2).sum()
        return found, *torch.autograd.grad(found, (x, w))

    x0, w0 = double(3, 4), double(5, 4)
    remote = third(lambda x, w: gradwire.torch.linear(x, w, client=client))
    assert_close(remote, third(F.linear))


def test_only_what_is_needed_is_computed(
    client: gradwire.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    gradients = client.gradients

    def watched(*args: Any, **options: Any) -> Any:
        asked.append(options["results"])
        return gradients(*args, **options)

    monkeypatch.setattr(client, "gradients", watched)
    x, w = torch.randn(4, 3), torch.randn(2, 3)
    for needs, expected in (
        ((False, False), [["dx"]]),
        ((True, False), [["dx"], ["y"]]),
        ((False, True), [["dx"], ["dw"]]),
        ((True, True), [["dx"], ["y", "dw"]]),
    ):
        asked.clear()
        x.requires_grad_(needs[0])
        w.requires_grad_(needs[1])
        y = gradwire.torch.linear(x, w, client=client)
        if any(needs):
            y.sum().backward()
        assert asked == expected


def test_any_layout_of_operands_and_gradients_is_taken(client: gradwire.Client) -> None:
    x = torch.randn(3, 5, 4).transpose(0, 1).requires_grad_()
    w = torch.randn(4, 8)[:, ::2].T.requires_grad_()
    compare(lambda x, w: gradwire.torch.linear(x, w, client=client), F.linear, x, w)
    # The gradient of a sum has strides of 0.
    (dw,) = torch.autograd.grad(gradwire.torch.linear(x, w, client=client).sum(), w)
    assert_close(dw, torch.autograd.grad(F.linear(x, w).sum(), w)[0])


def test_nothing_is_recorded_without_gradients(client: gradwire.Client) -> None:
    x, w = torch.randn(2, 3), torch.randn(4, 3, requires_grad=True)
    with torch.no_grad():
        y = gradwire.torch.linear(x, w, client=client)
    assert not y.requires_grad
    with torch.inference_mode():
        y = gradwire.torch.linear(torch.randn(2, 3), w, client=client)
    assert y.is_inference()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_for_torchs(
    client: gradwire.Client, dtype: torch.dtype
) -> None:
    x, w = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    b = torch.randn(4, requires_grad=True)
    with torch.autocast("cpu", dtype):
        compare(
            lambda *args: gradwire.torch.linear(*args, client=client), F.linear, x, w, b
        )
        exact = gradwire.torch.linear(x.double(), w.double(), client=client)
    assert exact.dtype is torch.float64


def test_functional_transforms_are_torchs(client: gradwire.Client) -> None:
    x, w = torch.randn(6, 3).double(), torch.randn(4, 3).double()
    weights, batch = torch.randn(6, 4, 3).double(), torch.randn(6, 2, 3).double()

    def linear(x: Any, w: Any) -> Any:
        return gradwire.torch.linear(x, w, client=client)

    def results(linear: Any) -> Any:
        def loss(x: Any, w: Any) -> Any:
            return linear(x, w).sin().sum()

        return (
            torch.func.grad(loss, argnums=(0, 1))(x, w),
            torch.func.jacrev(linear, argnums=(0, 1))(x, w),
            torch.func.jacrev(torch.func.grad(loss, argnums=1), argnums=(0, 1))(x, w),
            torch.func.vmap(linear, in_dims=(0, None))(batch, w),
            torch.func.vmap(linear, in_dims=(None, 0))(x, weights),
            torch.func.vmap(linear, in_dims=(0, 0), out_dims=1)(batch, weights),
            torch.func.vmap(linear, in_dims=(1, 2))(x.T, weights.permute(1, 2, 0)),
            # Gradients for each sample.
            torch.func.vmap(torch.func.grad(loss, argnums=1), in_dims=(0, None))(x, w),
            torch.func.vmap(torch.func.vmap(linear, (0, None)), (0, 0))(batch, weights),
        )

    assert_close(results(linear), results(F.linear))


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_forward_mode_is_refused(client: gradwire.Client) -> None:
    def linear(x: Any) -> Any:
        return gradwire.torch.linear(x, w, client=client)

    def loss(x: Any) -> Any:
        return linear(x).sin().sum()

    def tangent(x: Any) -> Any:
        return torch.func.jvp(linear, (x,), (x,))[1]

    def dual(call: Any, primal: Any) -> Any:
        with forward_ad.dual_level():
            return call(forward_ad.make_dual(primal, primal))

    x, w = torch.randn(2, 3), torch.randn(4, 3)
    needing = x.clone().requires_grad_()
    y = linear(needing)
    calls: list[Any] = [
        lambda: tangent(x),
        lambda: torch.func.jvp(
            lambda w: gradwire.torch.matmul(x, w.T, client=client), (w,), (w,)
        ),
        lambda: torch.func.jacfwd(linear)(x),
        lambda: torch.func.linearize(linear, x),
        lambda: torch.func.hessian(loss)(x),
        lambda: torch.func.jvp(torch.func.grad(loss), (x,), (x,)),
        lambda: torch.func.grad(lambda x: tangent(x).sum())(x),
        lambda: torch.func.vmap(tangent)(x),
        lambda: torch.func.jvp(torch.func.vmap(linear), (x,), (x,)),
        lambda: dual(linear, x),
        lambda: dual(lambda dy: torch.autograd.grad(y, needing, dy), torch.ones(2, 4)),
    ]
    for call in calls:
        with pytest.raises(NotImplementedError) as raised:
            call()
        assert str(raised.value) == (
            "forward-mode derivatives are not supported by a product on a server: use"
            " reverse mode, as torch.autograd.grad, torch.func.vjp and jacrev do"
        )


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_forward_mode_beside_a_product_is_torchs(client: gradwire.Client) -> None:
    def results(linear: Any) -> Any:
        return (
            torch.func.jvp(lambda bias: linear(x, w, bias), (bias,), (bias,)),
            torch.func.jvp(lambda scale: linear(x, w) * scale, (bias,), (bias,)),
            torch.func.jacfwd(lambda bias: linear(x, w, bias).sin())(bias),
        )

    x, w, bias = torch.randn(2, 3), torch.randn(4, 3), torch.randn(4)
    assert_close(
        results(lambda *args: gradwire.torch.linear(*args, client=client)),
        results(F.linear),
    )


def test_what_else_is_not_implemented_keeps_its_words(
    client: gradwire.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gradients(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("something else")

    monkeypatch.setattr(client, "gradients", gradients)
    with pytest.raises(NotImplementedError, match="something else"):
        gradwire.torch.linear(torch.ones(2, 3), torch.ones(4, 3), client=client)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_compiled_graph_holds_the_product_and_its_client(
    training_server: ServerProcess,
) -> None:
    torch.compiler.reset()

    def loss(x: Any, w: Any, client: Any) -> Any:
        y = gradwire.torch.linear(x.relu(), w, client=client, wire_dtype=None)
        return gradwire.torch.matmul(y, w, client=client).sin().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    x, w = double(5, 3), double(3, 3)
    expected = (F.linear(x.relu(), w) @ w).sin().sum()
    of_torch = torch.autograd.grad(expected, (x, w))
    for _ in range(2):
        with gradwire.connect(training_server.address) as one:
            loss(x, w, one)
            before = one.last_receipt
            found = compiled(x, w, one)
            assert one.last_receipt is not before
            assert_close(found, expected.detach())
            assert_close(torch.autograd.grad(found, (x, w)), of_torch)


def test_bad_arguments_are_named(client: gradwire.Client) -> None:
    x, w = torch.randn(2, 3), torch.randn(4, 3)
    linear, matmul = gradwire.torch.linear, gradwire.torch.matmul
    bad: list[tuple[str, Any]] = [
        ("x's columns must equal w's columns", lambda: linear(x, w.T, client=client)),
        ("x's columns must equal w's rows", lambda: matmul(x, w, client=client)),
        ("one dtype", lambda: linear(x, w.double(), client=client)),
        ("int64", lambda: linear(x.long(), w.long(), client=client)),
        ("exactly two", lambda: linear(x, w[None], client=client)),
        ("exactly two", lambda: linear(x[0, 0], w, client=client)),
        ("client is a str", lambda: linear(x, w, client="gpu-node:50051")),
        ("x is a list", lambda: linear([[1.0]], w, client=client)),
        ("one device", lambda: linear(x, w.to("meta"), client=client)),
    ]
    for text, call in bad:
        with pytest.raises(gradwire.InputError, match=text):
            call()
    with pytest.raises(TypeError, match="results"):
        linear(x, w, client=client, results="y")


def test_without_torch_the_package_says_what_to_install(tmp_path: Any) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import gradwire.torch"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert "pip install 'gradwire[torch]'" in done.stderr.splitlines()[-1]


def test_the_compiler_is_imported_by_those_who_use_it() -> None:
    """It takes longer than all of gradwire, and than much of PyTorch."""
    code = "import sys, torch; before = set(sys.modules); import gradwire.torch; "
    code += "print(*(each for each in set(sys.modules) - before if 'torch._' in each))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "torch._dynamo" not in done.stdout.split()
    assert "gradwire.torch._linear" in done.stdout.split()
