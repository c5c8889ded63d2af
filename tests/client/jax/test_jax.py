"""`gradwire.jax` gives what `jax.numpy` gives, by as few jobs as that takes."""

from __future__ import annotations

import gc
import itertools
import os
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

import gradwire
from tests.support import oracle
from tests.support.serving import ServerProcess, running_server

jax = pytest.importorskip("jax")
jnp = pytest.importorskip("jax.numpy")
gradwire_jax = pytest.importorskip("gradwire.jax")

Job = tuple[int, int, int, str]

# What a failed callback raises: the first where JAX runs it later, the second where at
# once.
FAILURES = (jax.errors.JaxRuntimeError, ValueError)


@pytest.fixture(scope="module")
def jax_server() -> Iterator[ServerProcess]:
    """A server of these tests, whose log is theirs alone."""
    with running_server() as process:
        yield process


@pytest.fixture(scope="module")
def client(jax_server: ServerProcess) -> Iterator[gradwire.Client]:
    with gradwire.connect(jax_server.address, timeout_s=60) as client:
        yield client


@pytest.fixture(scope="module")
def matmul(client: gradwire.Client) -> Any:
    return partial(gradwire_jax.matmul, client=client)


@pytest.fixture
def jobs_of(jax_server: ServerProcess) -> Callable[[Callable[[], Any]], list[Job]]:
    """Calls a function, and returns (m, n, k, results) of its jobs, sorted."""

    def jobs() -> list[Job]:
        return [
            (each["m"], each["n"], each["k"], each["results"])
            for each in jax_server.records
            if "results" in each
        ]

    def jobs_of(call: Callable[[], Any]) -> list[Job]:
        before = len(jobs())
        jax.block_until_ready(call())
        return sorted(jobs()[before:])

    return jobs_of


@pytest.fixture
def x64() -> Iterator[None]:
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def normal(*shape: int, seed: int = 0, dtype: str = "float32") -> Any:
    rng = np.random.default_rng([seed, *shape])
    return jnp.asarray(rng.standard_normal(shape), dtype=dtype)


def assert_close(actual: Any, expected: Any, tolerance: float = 2e-5) -> None:
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


def local(x: Any, w: Any) -> Any:
    return jnp.matmul(x, w, precision="highest")


def loss_of(product: Any) -> Any:
    """A loss whose dY differs from element to element, and depends on Y."""

    def loss(x: Any, w: Any) -> Any:
        return jnp.sin(product(x, w)).sum()

    return loss


SHAPES = [
    ((7, 5), (5, 3)),
    ((5,), (5, 3)),
    ((7, 5), (5,)),
    ((5,), (5,)),
    ((2, 4, 7, 5), (5, 3)),
    ((4, 7, 5), (4, 5, 3)),
    ((7, 5), (4, 5, 3)),
    ((5,), (4, 5, 3)),
    ((4, 7, 5), (5,)),
    ((2, 4, 7, 5), (4, 5, 3)),
    ((4, 7, 5), (2, 4, 5, 3)),
    ((6, 1, 4, 7, 5), (2, 4, 5, 3)),
    ((4, 7, 5), (1, 5, 3)),
    ((1, 7, 5), (4, 5, 3)),
    ((0, 5), (5, 3)),
    ((7, 0), (0, 3)),
    ((0, 7, 5), (0, 5, 3)),
]


@pytest.mark.parametrize(("x_shape", "w_shape"), SHAPES, ids=str)
def test_products_and_gradients_of_every_shape(
    matmul: Any, x_shape: tuple[int, ...], w_shape: tuple[int, ...]
) -> None:
    x, w = normal(*x_shape), normal(*w_shape, seed=1)
    assert_close(matmul(x, w), local(x, w))
    grad = partial(jax.grad, argnums=(0, 1))
    actual = grad(loss_of(matmul))(x, w)
    assert_close(actual, grad(loss_of(local))(x, w))


def test_jit_grad_and_value_and_grad(matmul: Any, jobs_of: Any) -> None:
    x, w = normal(8, 5), normal(5, 3)
    expected = jax.value_and_grad(loss_of(local), argnums=(0, 1))(x, w)
    actual = jax.value_and_grad(loss_of(matmul), argnums=(0, 1))
    assert_close(actual(x, w), expected)
    assert_close(jax.jit(actual)(x, w), expected)
    assert jobs_of(lambda: jax.jit(actual)(x, w)) == [
        (8, 5, 3, "dx,dw"),
        (8, 5, 3, "y"),
    ]


@pytest.mark.parametrize(("argument", "result"), [(0, "dx"), (1, "dw")])
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_a_backward_pass_asks_for_what_is_needed(
    matmul: Any, jobs_of: Any, argument: int, result: str, jit: bool
) -> None:
    x, w = normal(8, 5), normal(5, 3)
    inner = jax.jit(matmul) if jit else matmul
    grad = jax.grad(loss_of(inner), argnums=argument)
    assert jobs_of(lambda: grad(x, w)) == [(8, 5, 3, result), (8, 5, 3, "y")]
    assert_close(grad(x, w), jax.grad(loss_of(local), argnums=argument)(x, w))


def test_no_gradient_no_backward_job(matmul: Any, jobs_of: Any) -> None:
    x, w = normal(8, 5), normal(5, 3)

    def loss(x: Any) -> Any:
        return (x**2).sum() + matmul(jax.lax.stop_gradient(x), w).sum()

    assert_close(jax.grad(loss)(x), 2 * x)
    assert jobs_of(lambda: jax.grad(loss)(x)) == [(8, 5, 3, "y")]


def test_vmap_over_x_is_one_job_of_more_rows(matmul: Any, jobs_of: Any) -> None:
    x, w = normal(6, 8, 5), normal(5, 3)
    over_x = jax.vmap(matmul, in_axes=(0, None))
    assert_close(over_x(x, w), local(x, w))
    assert jobs_of(lambda: jax.jit(over_x)(x, w)) == [(48, 5, 3, "y")]
    last = jax.vmap(matmul, in_axes=(2, None), out_axes=1)
    assert_close(last(x.transpose(1, 2, 0), w), local(x, w).swapaxes(0, 1))
    nested = jax.vmap(over_x, in_axes=(1, None))
    assert_close(
        nested(normal(6, 2, 8, 5), w), local(normal(6, 2, 8, 5), w).swapaxes(0, 1)
    )
    assert jobs_of(lambda: nested(normal(6, 2, 8, 5), w)) == [(96, 5, 3, "y")]


def test_the_gradient_of_a_vmapped_loss_is_one_job(matmul: Any, jobs_of: Any) -> None:
    """A batch that is written for one example: more rows, for Y, dX and dW."""
    x, w = normal(6, 5), normal(5, 3)

    def gradients(product: Any) -> Any:
        def mean(x: Any, w: Any) -> Any:
            return jax.vmap(jax.jit(loss_of(product)), (0, None))(x, w).mean()

        return jax.grad(mean, argnums=(0, 1))

    assert_close(gradients(matmul)(x, w), gradients(local)(x, w))
    done = jobs_of(lambda: jax.jit(gradients(matmul))(x, w))
    assert done == [(6, 5, 3, "dx,dw"), (6, 5, 3, "y")]


def test_a_gradient_for_each_example(matmul: Any, jobs_of: Any) -> None:
    x, w = normal(6, 2, 5), normal(5, 3)
    of_each = jax.vmap(jax.grad(loss_of(matmul), argnums=(0, 1)), in_axes=(0, None))
    expected = jax.vmap(jax.grad(loss_of(local), argnums=(0, 1)), in_axes=(0, None))
    assert_close(of_each(x, w), expected(x, w))
    done = jobs_of(lambda: of_each(x, w))
    assert done == 6 * [(2, 5, 3, "dw")] + [(12, 5, 3, "dx"), (12, 5, 3, "y")]


@pytest.mark.parametrize("in_axes", [(0, 0), (None, 0), (0, None), (1, 2), (None, 1)])
def test_vmap_over_either_operand(matmul: Any, in_axes: Any) -> None:
    b = 4
    x, w = normal(7, 5), normal(5, 3)
    if in_axes[0] is not None:
        x = jnp.moveaxis(normal(b, 7, 5), 0, in_axes[0])
    if in_axes[1] is not None:
        w = jnp.moveaxis(normal(b, 5, 3), 0, in_axes[1])
    of_one = {
        "y": lambda f: f,
        "gradients": lambda f: jax.grad(loss_of(f), argnums=(0, 1)),
    }
    for make in of_one.values():
        expected = jax.vmap(make(local), in_axes)(x, w)
        assert_close(jax.vmap(make(matmul), in_axes)(x, w), expected)
        assert_close(jax.jit(jax.vmap(make(matmul), in_axes))(x, w), expected)


def test_vmap_over_w_alone_is_one_job(matmul: Any, jobs_of: Any) -> None:
    x, w = normal(7, 5), normal(4, 5, 3)
    over_w = jax.vmap(matmul, in_axes=(None, 0))
    assert jobs_of(lambda: over_w(x, w)) == [(7, 5, 12, "y")]
    assert jobs_of(lambda: matmul(x, w)) == [(7, 5, 12, "y")]


def test_a_jacobian_is_two_jobs(matmul: Any, jobs_of: Any) -> None:
    """vmap over dY alone, in the backward pass."""
    x, w = normal(2, 5), normal(5, 3)
    jacobians = jax.jacrev(matmul, argnums=(0, 1))
    assert_close(jacobians(x, w), jax.jacrev(local, argnums=(0, 1))(x, w))
    done = jobs_of(lambda: jacobians(x, w))
    assert done == [(2, 5, 3, "y"), (2, 5, 18, "dw"), (12, 5, 3, "dx")]


@pytest.mark.thorough
def test_scan_over_layers_and_over_examples(matmul: Any, jobs_of: Any) -> None:
    x, ws = normal(7, 5), normal(3, 5, 5) / 2

    def deep(product: Any) -> Any:
        def loss(x: Any, ws: Any) -> Any:
            def layer(h: Any, w: Any) -> Any:
                return jnp.tanh(product(h, w)), None

            return jax.lax.scan(layer, x, ws)[0].sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1)))

    assert_close(deep(matmul)(x, ws), deep(local)(x, ws))
    done = jobs_of(lambda: deep(matmul)(x, ws))
    assert done == 3 * [(7, 5, 5, "dx,dw")] + 3 * [(7, 5, 5, "y")]
    batch = normal(4, 7, 5)
    actual = jax.vmap(deep(matmul), in_axes=(0, None))(batch, ws)
    assert_close(actual, jax.vmap(deep(local), in_axes=(0, None))(batch, ws))


def test_control_flow(matmul: Any) -> None:
    x, w = normal(7, 5), normal(5, 5) / 3

    def both(product: Any) -> Any:
        def loss(x: Any, w: Any, n: Any) -> Any:
            y = jax.lax.cond(n > 0, product, lambda x, w: x + w[0], x, w)
            return jax.lax.fori_loop(0, 3, lambda _, h: product(h, w), y).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1)))

    for n in (0, 1):
        assert_close(both(matmul)(x, w, n), both(local)(x, w, n))


def test_remat(matmul: Any, jobs_of: Any) -> None:
    x, w, v = normal(7, 5), normal(5, 4), normal(4, 3)

    def gradients(product: Any, remat: Any) -> Any:
        def block(x: Any, w: Any, v: Any) -> Any:
            return jnp.sin(product(jnp.sin(product(x, w)), v))

        return jax.grad(lambda *a: remat(block)(*a).sum(), argnums=(0, 1, 2))

    expected = gradients(local, lambda f: f)(x, w, v)
    again = gradients(matmul, jax.checkpoint)
    assert_close(again(x, w, v), expected)
    assert_close(jax.jit(again)(x, w, v), expected)
    done = [job[3] for job in jobs_of(lambda: again(x, w, v))]
    assert done.count("y") == 4  # each of the two is computed again
    assert done.count("dx,dw") == 2


@pytest.mark.thorough
def test_nested_jit_vmap_and_grad(matmul: Any) -> None:
    x, w = normal(3, 4, 7, 5), normal(4, 5, 3)

    def nested(product: Any) -> Any:
        per_example = jax.grad(jax.jit(loss_of(product)), argnums=(0, 1))
        heads = jax.vmap(jax.jit(per_example), in_axes=(0, 0))
        return jax.jit(jax.vmap(heads, in_axes=(0, None)))

    assert_close(nested(matmul)(x, w), nested(local)(x, w))
    outer = jax.grad(
        lambda x, w: (nested(matmul)(x, w)[0] ** 2).sum() * 0.1, argnums=(0, 1)
    )
    expected = jax.grad(
        lambda x, w: (nested(local)(x, w)[0] ** 2).sum() * 0.1, argnums=(0, 1)
    )
    assert_close(outer(x, w), expected(x, w), 1e-4)


@pytest.mark.thorough
def test_second_and_third_derivatives_in_reverse_mode(matmul: Any) -> None:
    x, w = normal(3, 4), normal(4, 2)

    def penalty(product: Any) -> Any:
        def loss(x: Any, w: Any) -> Any:
            dx, dw = jax.grad(loss_of(product), argnums=(0, 1))(x, w)
            return (dx**2).sum() + jnp.cos(dw).sum()

        return loss

    second = jax.grad(penalty(matmul), argnums=(0, 1))
    expected = jax.grad(penalty(local), argnums=(0, 1))
    assert_close(second(x, w), expected(x, w), 1e-4)
    assert_close(jax.jit(second)(x, w), expected(x, w), 1e-4)
    third = jax.grad(lambda *a: (second(*a)[1] ** 2).sum())(x, w)
    assert_close(third, jax.grad(lambda *a: (expected(*a)[1] ** 2).sum())(x, w), 1e-3)
    hessian = jax.jacrev(jax.jacrev(loss_of(matmul)))(x, w)
    assert_close(hessian, jax.jacrev(jax.jacrev(loss_of(local)))(x, w), 1e-4)


FORWARD: dict[str, Any] = {
    "jvp": lambda f, x, w: jax.jvp(f, (x, w), (x + 1, w * 2)),
    "jvp of x": lambda f, x, w: jax.jvp(lambda x: f(x, w), (x,), (x + 1,)),
    "jvp of w": lambda f, x, w: jax.jvp(lambda w: f(x, w), (w,), (w + 1,)),
    "jacfwd": lambda f, x, w: jax.jacfwd(f, argnums=(0, 1))(x, w),
    "linearize": lambda f, x, w: jax.linearize(f, x, w)[1](w[0] * x, w),
    "jit": lambda f, x, w: jax.jit(lambda *a: jax.jvp(f, a, a))(x, w),
    "vmap": lambda f, x, w: jax.jvp(jax.vmap(f, (0, None)), (x[None], w), (x[None], w)),
    "over reverse": lambda f, x, w: jax.jvp(
        jax.grad(lambda x, w: (f(x, w) ** 3).sum(), argnums=(0, 1)), (x, w), (x, w)
    ),
    "over forward": lambda f, x, w: jax.jvp(
        lambda x, w: jax.jvp(f, (x, w), (x, w))[1], (x, w), (x + 1, w)
    ),
    "reverse over forward": lambda f, x, w: jax.grad(
        lambda x, w: (jax.jvp(f, (x, w), (x, w))[1] ** 2).sum(), argnums=(0, 1)
    )(x, w),
    "reverse over linearize over vmap": lambda f, x, w: jax.vjp(
        jax.vmap(jax.linearize(f, x, w)[1], (0, None)), jnp.stack([x, x]), w
    )[1](jnp.ones((2, 2, 3))),
    "hessian": lambda f, x, w: jax.hessian(lambda x, w: jnp.sin(f(x, w)).sum(), (0, 1))(
        x, w
    ),
}


@pytest.mark.thorough
@pytest.mark.parametrize("mode", FORWARD)
def test_forward_mode(matmul: Any, mode: str) -> None:
    x, w = normal(2, 3), normal(3, 3)
    of = FORWARD[mode]
    assert_close(of(matmul, x, w), of(local, x, w), 1e-4)


def test_a_tangent_of_one_operand_is_one_job(matmul: Any, jobs_of: Any) -> None:
    x, w = normal(8, 5), normal(5, 3)
    done = jobs_of(lambda: jax.jvp(lambda x: matmul(x, w), (x,), (x,)))
    assert done == 2 * [(8, 5, 3, "y")]


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_every_dtype_within_its_bounds(matmul: Any, dtype: str, x64: None) -> None:
    x, w, dy = oracle.operands(40, 30, 20, dtype)
    y, pull = jax.vjp(jax.jit(matmul), jnp.asarray(x), jnp.asarray(w))
    dx, dw = pull(jnp.asarray(dy))
    assert y.dtype == dx.dtype == dw.dtype == dtype
    result = gradwire.Gradients(*map(np.asarray, (y, dx, dw)), None)  # type: ignore[arg-type]
    oracle.assert_right(result, x, w, dy, dtype)


def test_results_have_the_bits_of_the_client(
    client: gradwire.Client, matmul: Any
) -> None:
    operands = oracle.operands(3000, 40, 30)
    y, pull = jax.vjp(matmul, *map(jnp.asarray, operands[:2]))
    dx, dw = pull(jnp.asarray(operands[2]))
    expected = client.gradients(*operands)
    for one, other in zip((y, dx, dw), expected, strict=True):
        assert oracle.same_bits(np.asarray(one), other)


def test_linear_is_a_dense_layer(client: gradwire.Client) -> None:
    x, w, b = normal(2, 7, 5), normal(5, 3), normal(3)
    remote = partial(gradwire_jax.linear, client=client)

    def loss(layer: Any) -> Any:
        return jax.grad(lambda *a: jnp.sin(layer(*a)).sum(), argnums=(0, 1, 2))

    assert_close(remote(x, w, b), local(x, w) + b)
    assert_close(remote(x, w), local(x, w))
    assert_close(loss(remote)(x, w, b), loss(lambda x, w, b: local(x, w) + b)(x, w, b))
    half = remote(x.astype("bfloat16"), w.astype("bfloat16"), b)
    assert half.dtype == "bfloat16"


def test_options_reach_the_job(client: gradwire.Client, jobs_of: Any) -> None:
    x, w = oracle.operands(400, 30, 20)[:2]
    y = gradwire_jax.matmul(x, w, client=client, wire_dtype="bfloat16", verify=True)
    assert y.dtype == "float32"
    assert oracle.same_bits(np.asarray(y), client.forward(x, w, wire_dtype="bfloat16"))
    rounded = x.astype("bfloat16").astype("f4") @ w.astype("bfloat16").astype("f4")
    np.testing.assert_allclose(y, rounded, rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize(
    ("x", "w", "text"),
    [
        ((7, 5), (4, 3), r"x has shape \(7, 5\) and w \(4, 3\): x's last dimension"),
        ((2, 7, 5), (3, 5, 3), r"the batch dimensions \(2,\) and \(3,\) cannot be"),
        ((), (5, 3), r"x has shape \(\): expected at least one dimension"),
    ],
)
def test_wrong_shapes_are_named(matmul: Any, x: Any, w: Any, text: str) -> None:
    for call in (matmul, jax.jit(matmul), jax.grad(loss_of(matmul))):
        with pytest.raises(gradwire.InputError, match=text):
            call(jnp.ones(x), jnp.ones(w))


def test_wrong_arguments_are_refused_before_anything_is_sent(
    client: gradwire.Client, jobs_of: Any
) -> None:
    x, w = normal(7, 5), normal(5, 3)
    matmul, linear = gradwire_jax.matmul, gradwire_jax.linear
    refused: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (
            gradwire.InputError,
            "x is float32 and w bfloat16: expected one dtype of float16, bfloat16",
            lambda: matmul(x, w.astype("bfloat16"), client=client),
        ),
        (
            gradwire.InputError,
            "x is int32 and w int32: expected one dtype",
            lambda: matmul(x.astype(int), w.astype(int), client=client),
        ),
        (
            gradwire.InputError,
            "client is a str: expected the gradwire.Client",
            lambda: matmul(x, w, client="gpu-node:50051"),
        ),
        (
            gradwire.InputError,
            "timeout_s is -1",
            lambda: matmul(x, w, client=client, timeout_s=-1),
        ),
        (
            gradwire.InputError,
            "x is bfloat16, but wire_dtype is for float32 operands",
            lambda: matmul(
                x.astype("bfloat16"),
                w.astype("bfloat16"),
                client=client,
                wire_dtype="bfloat16",
            ),
        ),
        (
            TypeError,
            r"matmul\(\) got an unexpected keyword argument 'results'",
            lambda: matmul(x, w, client=client, results="y"),
        ),
        (
            gradwire.InputError,
            r"w has shape \(2, 5, 3\): expected \(inputs, outputs\)",
            lambda: linear(x, jnp.ones((2, 5, 3)), client=client),
        ),
        (
            gradwire.InputError,
            r"w has shape \(5, 3\): expected b of shape \(3,\), but b has shape \(4,\)",
            lambda: linear(x, w, jnp.ones(4), client=client),
        ),
    ]

    def all_of_them() -> None:
        for kind, text, call in refused:
            with pytest.raises(kind, match=text):
                call()

    assert jobs_of(all_of_them) == []


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_the_text_of_an_error_reaches_the_caller(jit: bool) -> None:
    x, w = normal(7, 5), normal(5, 3)
    with (
        running_server() as server,
        gradwire.connect(server.address, timeout_s=10, retries=False) as client,
    ):
        product = partial(gradwire_jax.matmul, client=client)
        product = jax.jit(product) if jit else product
        assert_close(product(x, w), local(x, w))
        _, pull = jax.vjp(product, x, w)
        server.kill()
        for call in (lambda: product(x, w), lambda: pull(jnp.ones((7, 3)))):
            with pytest.raises(FAILURES) as caught:
                jax.block_until_ready(call())
            last = str(caught.value).strip().splitlines()[-1]
            assert re.match("Conn(ect|ectionLost)Error: ", last), last
            assert server.address in last


def test_a_closed_client_is_named(jax_server: ServerProcess) -> None:
    client = gradwire.connect(jax_server.address, timeout_s=60)
    product = jax.jit(partial(gradwire_jax.matmul, client=client))
    product(normal(7, 5), normal(5, 3)).block_until_ready()
    client.close()
    with pytest.raises(FAILURES, match="ClientStateError: this Clie"):
        jax.block_until_ready(product(normal(7, 5), normal(5, 3)))


def test_compiled_functions_do_not_keep_a_client(jax_server: ServerProcess) -> None:
    x, w = normal(7, 5), normal(5, 3)
    client = gradwire.connect(jax_server.address, timeout_s=60)
    product = jax.jit(partial(gradwire_jax.matmul, client=client))
    compiled = product.lower(x, w).compile()
    assert_close(compiled(x, w), local(x, w))
    gone = weakref.ref(client)
    client.close()
    del product, client
    gc.collect()
    assert gone() is None
    with pytest.raises(FAILURES, match="client of this product no"):
        jax.block_until_ready(compiled(x, w))


def test_threads_share_compiled_functions(matmul: Any) -> None:
    """More callbacks than XLA has threads, each with large operands."""
    x, w = normal(700, 600), normal(600, 500)

    @jax.jit
    def three(x: Any, w: Any) -> Any:
        return matmul(x + 1, w) + matmul(x, w * 2) + matmul(x * 3, w - 1)

    expected = local(x + 1, w) + local(x, w * 2) + local(x * 3, w - 1)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            for _ in range(2):
                assert_close(three(x, w), expected, 1e-2)
        except BaseException as error:  # noqa: BLE001 - shown below
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.thorough
def test_shard_map(jax_server: ServerProcess, check_vma: bool) -> None:
    """In a process of two devices, each with half of the rows.

    Where JAX follows over which axes results vary, a product is refused.
    """
    program = """if True:
        import sys
        import gradwire.jax, jax, jax.numpy as jnp, numpy as np
        from jax.sharding import PartitionSpec as P

        with gradwire.connect(sys.argv[1], timeout_s=60) as client:
            mesh = jax.sharding.Mesh(jax.devices(), ("d",))
            x = np.random.default_rng(0).standard_normal((8, 5)).astype("f4")
            w = np.random.default_rng(1).standard_normal((5, 3)).astype("f4")

            def gradients(product):
                sharded = jax.shard_map(
                    product, mesh=mesh, in_specs=(P("d"), P()), out_specs=P("d"),
                    check_vma=bool(int(sys.argv[2])),
                )
                loss = lambda x, w: jnp.sin(sharded(x, w)).sum()
                return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, w)

            try:
                remote = gradients(
                    lambda x, w: gradwire.jax.matmul(x, w, client=client)
                )
            except NotImplementedError as error:
                sys.exit(print(str(error)[-46:]))
            local = gradients(lambda x, w: jnp.matmul(x, w, precision="highest"))
            for a, b in zip(jax.tree.leaves(remote), jax.tree.leaves(local)):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        print("same")
    """
    done = subprocess.run(
        [sys.executable, "-c", program, jax_server.address, str(int(check_vma))],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
    )
    refused = "pass check_vma=False to jax.shard_map\n"
    assert done.stdout.endswith(refused if check_vma else "same\n"), done.stderr


def test_shared_memory() -> None:
    operands = oracle.operands(700, 600, 500)
    with (
        running_server(allow_shared_memory=True) as server,
        gradwire.connect(server.address, timeout_s=60, transport="shm") as client,
    ):
        product = partial(gradwire_jax.matmul, client=client)
        y, pull = jax.vjp(product, *map(jnp.asarray, operands[:2]))
        results = (y, *pull(jnp.asarray(operands[2])))
        expected = client.gradients(*operands)
        transports = [each["transport"] for each in server.records if "results" in each]
    assert transports == 3 * ["shm"]
    for one, other in zip(results, expected, strict=True):
        assert oracle.same_bits(np.asarray(one), other)


def test_donated_operands(matmul: Any) -> None:
    x, w = normal(700, 600), normal(600, 600) / 30
    step = jax.jit(lambda x, w: matmul(x, w) + x, donate_argnums=0)
    expected, actual = x, x + 0
    for _ in range(3):
        expected = local(expected, w) + expected
        actual = step(actual, w)
    assert_close(actual, expected, 1e-4)


def test_a_product_is_compiled_once(matmul: Any) -> None:
    x, w = normal(9, 5), normal(5, 3)
    matmul(x, w).block_until_ready()
    with jax.log_compiles(True):
        import logging

        records: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("jax").addHandler(handler)
        try:
            matmul(x, w).block_until_ready()
        finally:
            logging.getLogger("jax").removeHandler(handler)
    assert not [each for each in records if "ompil" in each]


def test_training_gives_the_same_losses(client: gradwire.Client) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((64, 20)), "float32")
    target = jnp.sin(x @ jnp.asarray(rng.standard_normal((20, 1)), "float32"))
    sizes = (20, 32, 16, 1)
    start = [
        (
            jnp.asarray(rng.standard_normal((n, k)) / n**0.5, "float32"),
            jnp.zeros(k, "float32"),
        )
        for n, k in itertools.pairwise(sizes)
    ]

    def losses_with(layer: Any) -> list[float]:
        def loss(parameters: Any) -> Any:
            h = x
            for w, b in parameters[:-1]:
                h = jnp.tanh(layer(h, w, b))
            return ((layer(h, *parameters[-1]) - target) ** 2).mean()

        @jax.jit
        def step(parameters: Any) -> Any:
            value, gradients = jax.value_and_grad(loss)(parameters)
            moved = jax.tree.map(lambda p, g: p - 0.1 * g, parameters, gradients)
            return value, moved

        parameters, losses = start, []
        for _ in range(20):
            value, parameters = step(parameters)
            losses.append(float(value))
        return losses

    actual = losses_with(partial(gradwire_jax.linear, client=client))
    expected = losses_with(lambda x, w, b: local(x, w) + b)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)
    assert actual[-1] < actual[0] / 2


def test_jax_is_imported_only_for_it() -> None:
    program = """if True:
        import sys
        import gradwire
        assert "jax" not in sys.modules
        sys.modules["jax"] = None
        try:
            import gradwire.jax
        except ImportError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    expected = "gradwire.jax needs JAX: pip install 'gradwire[jax]'\n"
    assert done.stdout == expected, done.stderr
