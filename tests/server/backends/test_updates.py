"""Updates of weights: PyTorch's, and what the papers' formulas say in wider numbers."""

from __future__ import annotations

import math
import tracemalloc
from fractions import Fraction
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest

from gradwire_protocol.optimizers import Adam, Sgd, check_optimizer
from gradwire_server.backends.numpy.updates import (
    CHUNK_BYTES,
    SUMMED_AT_ONCE,
    sum_of_squares,
    update,
)

STEPS = 100

OPTIMIZERS = [
    Sgd(0.1),
    Sgd(0.01, weight_decay=0.1),
    Sgd(0.01, momentum=0.9),
    Sgd(0.01, momentum=0.9, dampening=0.5),
    Sgd(0.01, momentum=0.9, nesterov=True),
    Sgd(0.01, momentum=0.9, dampening=0.3, weight_decay=0.01),
    Sgd(0.01, momentum=0.9, weight_decay=0.1, nesterov=True),
    Adam(1e-3),
    Adam(1e-3, beta2=0.95, eps=1e-3, weight_decay=0.1),
    Adam(1e-2, beta1=0.3, beta2=0.99),
    Adam(1e-2, beta1=0.0, beta2=0.0, eps=0.1),
    Adam(1e-2, weight_decay=0.1, decoupled=True),
    Adam(1e-3, decoupled=True),
]
DTYPES = [np.float32, np.float64]


def drawn(shape: Any, dtype: Any, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def zeros(optimizer: Any, p: Any) -> dict[str, Any]:
    return {name: np.zeros_like(p) for name in optimizer.states}


def sequence(shape: Any, dtype: Any, steps: int = STEPS) -> tuple[Any, Any]:
    """A weight, and a gradient for each step: of all sizes, and zero in places."""
    p = drawn(shape, dtype)
    sizes = (10.0 ** np.random.default_rng(1).integers(-4, 1, p.shape)).astype(dtype)
    gradients = [sizes * drawn(shape, dtype, 2 + step) for step in range(steps)]
    for step, g in enumerate(gradients):
        g[..., step % 7 :: 7] = 0
    return p, gradients


def torchs(torch: Any, optimizer: Any, weight: Any) -> Any:
    """PyTorch's own optimizer, one tensor after another."""
    if isinstance(optimizer, Sgd):
        return torch.optim.SGD(
            [weight],
            optimizer.lr,
            momentum=optimizer.momentum,
            dampening=optimizer.dampening,
            weight_decay=optimizer.weight_decay,
            nesterov=optimizer.nesterov,
            foreach=False,
        )
    return (torch.optim.AdamW if optimizer.decoupled else torch.optim.Adam)(
        [weight],
        optimizer.lr,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        foreach=False,
    )


def assert_near(actual: Any, expected: Any, dtype: Any, epsilons: float) -> None:
    """By norm, and no element is far off.

    An element's error is the sum of the roundings of its steps, each in proportion to
    the weight's size on the way.
    """
    eps = np.finfo(dtype).eps
    assert actual.dtype == dtype
    error = np.abs(np.asarray(actual, np.longdouble) - expected)
    assert np.linalg.norm(error) <= epsilons * eps * np.linalg.norm(expected)
    assert (error <= 10 * epsilons * eps * (1 + np.abs(expected))).all()


@pytest.mark.parametrize(("optimizer", "dtype"), list(product(OPTIMIZERS, DTYPES)))
def test_a_hundred_updates_are_torchs(optimizer: Any, dtype: Any) -> None:
    torch = pytest.importorskip("torch")
    p, gradients = sequence((64, 65), dtype)
    weight = torch.nn.Parameter(torch.from_numpy(p.copy()))
    theirs = torchs(torch, optimizer, weight)
    states = zeros(optimizer, p)
    for updates, g in enumerate(gradients):
        weight.grad = torch.from_numpy(g)
        theirs.step()
        update(optimizer, p, g, states, updates)
    # 2e-7 of the norm in float32.
    assert_near(p, weight.detach().numpy(), dtype, epsilons=1.67)
    for name, state in states.items():
        assert_near(state, theirs.state[weight][name].numpy(), dtype, epsilons=1.67)


@pytest.mark.parametrize("optimizer", [Sgd(0.01, 0.9), Adam(1e-3)])
def test_clipped_updates_are_torchs(optimizer: Any) -> None:
    torch = pytest.importorskip("torch")
    p, gradients = sequence((64, 65), np.float32)
    weight = torch.nn.Parameter(torch.from_numpy(p.copy()))
    theirs = torchs(torch, optimizer, weight)
    states = zeros(optimizer, p)
    for updates, g in enumerate(gradients):
        max_norm = 1.0 if updates % 2 else 100.0
        weight.grad = torch.from_numpy(g / np.float32(8))
        norm = torch.nn.utils.clip_grad_norm_([weight], max_norm)
        theirs.step()
        ours = math.sqrt(sum_of_squares(g)) / 8
        assert ours == pytest.approx(float(norm), rel=1e-6)
        clip = min(1.0, max_norm / (ours + 1e-6))
        update(optimizer, p, g, states, updates, scale=clip / 8)
    assert_near(p, weight.detach().numpy(), np.float32, epsilons=1.67)


def recomputed(optimizer: Any, p: Any, gradients: Any, scale: float) -> Any:
    """The weight after all gradients, from the sums that the recurrences stand for.

    After t updates, Adam's averages are (1 - beta) sum_i beta^(t-i) g_i (D. P. Kingma
    and J. Ba, section 3), and the momentum buffer is
    (1 - dampening) sum_i momentum^(t-i) g_i, with its first term undamped.
    """
    wide = np.longdouble
    p = p.astype(wide)
    past: list[Any] = []
    for t, g in enumerate(gradients, 1):
        coupled = not getattr(optimizer, "decoupled", False)
        decay = wide(optimizer.weight_decay)
        past.append(g.astype(wide) * wide(scale) + (decay * p if coupled else 0))
        ages = np.arange(t - 1, -1, -1).astype(wide)
        if isinstance(optimizer, Sgd):
            factors = wide(optimizer.momentum) ** ages
            factors[1:] *= 1 - wide(optimizer.dampening)
            buffer = np.tensordot(factors, np.stack(past), 1)
            ahead = past[-1] + optimizer.momentum * buffer
            p = p - optimizer.lr * (ahead if optimizer.nesterov else buffer)
            continue
        if not coupled:
            p = p - optimizer.lr * decay * p
        mean, square = (
            np.tensordot(wide(beta) ** ages, np.stack(powers), 1)
            / (wide(beta) ** ages).sum()
            for beta, powers in (
                (optimizer.beta1, past),
                (optimizer.beta2, [each**2 for each in past]),
            )
        )
        p = p - optimizer.lr * mean / (np.sqrt(square) + optimizer.eps)
    return p


@pytest.mark.parametrize(
    ("optimizer", "dtype", "scale"),
    [
        (optimizer, dtype, scale)
        for optimizer, dtype in product(OPTIMIZERS, DTYPES)
        for scale in (1.0, 0.3)
    ],
)
def test_a_hundred_updates_are_the_papers(
    optimizer: Any, dtype: Any, scale: float
) -> None:
    check_optimizer(optimizer)
    p, gradients = sequence((7, 9), dtype)
    expected = recomputed(optimizer, p, gradients, scale)
    states = zeros(optimizer, p)
    for updates, g in enumerate(gradients):
        update(optimizer, p, g, states, updates, scale=scale)
    # Half an epsilon for each step: weight decay multiplies by a rounded factor.
    assert_near(p, expected, dtype, epsilons=STEPS / 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_any_slices_of_a_weight_are_updated_to_the_same_bits(
    optimizer: Any, dtype: Any
) -> None:
    chunk = CHUNK_BYTES // np.dtype(dtype).itemsize
    for size in (1, 2, chunk - 1, chunk, chunk + 1, 2 * chunk + 3):
        whole, gradients = sequence(size, dtype, steps=2)
        parts = whole.copy()
        of_whole, of_parts = zeros(optimizer, whole), zeros(optimizer, whole)
        cuts = [0, size // 3, size // 3 + 1, size]
        for updates, g in enumerate(gradients):
            update(optimizer, whole, g, of_whole, updates, scale=0.3)
            for first, last in pairwise(cuts):
                states = {name: s[first:last] for name, s in of_parts.items()}
                at = slice(first, last)
                update(optimizer, parts[at], g[at], states, updates, scale=0.3)
        assert np.array_equal(whole, parts)
        for name, state in of_whole.items():
            assert np.array_equal(state, of_parts[name])


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (1, 1), (2, 3, 4)])
@pytest.mark.parametrize("optimizer", [Sgd(0.1, 0.9, nesterov=True), Adam(0.1)])
def test_weights_of_any_shape_are_updated(optimizer: Any, shape: Any) -> None:
    p, g = drawn(shape, np.float32), drawn(shape, np.float32, 1)
    # Of no dimensions, drawn gives a scalar.
    p, g = np.array(p), np.array(g)
    flat = p.reshape(-1).copy()
    of_p, of_flat = zeros(optimizer, p), zeros(optimizer, flat)
    update(optimizer, p, g, of_p, 0)
    update(optimizer, flat, g.reshape(-1), of_flat, 0)
    assert p.shape == shape
    assert np.array_equal(p.reshape(-1), flat)
    assert not np.any(flat == drawn(flat.shape, np.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_scale_is_applied_first_and_the_gradient_is_not_changed(
    optimizer: Any, dtype: Any
) -> None:
    p, (first, second) = sequence(50, dtype, steps=2)
    scaled_before = p.copy()
    states, others = zeros(optimizer, p), zeros(optimizer, p)
    for updates, g in enumerate((first, second)):
        given = g.copy()
        update(optimizer, p, g, states, updates, scale=0.3)
        assert np.array_equal(g, given)
        update(optimizer, scaled_before, g * dtype(0.3), others, updates)
    assert np.array_equal(p, scaled_before)


def test_the_first_momentum_buffer_is_the_gradient_whatever_was_there() -> None:
    p, (first, second) = sequence(50, np.float32, steps=2)
    optimizer = Sgd(0.1, momentum=0.5, dampening=0.75)
    states = {"momentum_buffer": np.full_like(p, np.nan)}
    update(optimizer, p, first, states, 0)
    assert np.array_equal(states["momentum_buffer"], first)
    update(optimizer, p, second, states, 1)
    # Powers of two, so that no product is rounded.
    expected = np.float32(0.5) * first + np.float32(0.25) * second
    assert np.array_equal(states["momentum_buffer"], expected)


def test_updates_go_on_from_saved_states() -> None:
    p, gradients = sequence(50, np.float32, steps=4)
    optimizer = Adam(0.1)
    states = zeros(optimizer, p)
    for updates, g in enumerate(gradients):
        if updates == 2:
            saved = p.copy(), {name: state.copy() for name, state in states.items()}
        update(optimizer, p, g, states, updates)
    again, its_states = saved
    for updates in (2, 3):
        update(optimizer, again, gradients[updates], its_states, updates)
    assert np.array_equal(again, p)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_elements_overflow_without_a_warning_or_an_effect_on_others(
    optimizer: Any, bad: float
) -> None:
    p, gradients = sequence(5, np.float32, steps=3)
    clean = p.copy()
    states, others = zeros(optimizer, p), zeros(optimizer, p)
    for updates, g in enumerate(gradients):
        update(optimizer, clean, g, others, updates, scale=2.0)
        g[3] = bad
        update(optimizer, p, g, states, updates, scale=2.0)
    assert not np.isfinite(p[3])
    assert np.array_equal(np.delete(p, 3), np.delete(clean, 3))


def test_options_overflow_without_a_warning() -> None:
    for optimizer in (Sgd(1e300, 1e300, 0, 1e300), Adam(1e300, weight_decay=1e300)):
        p, (g,) = sequence(5, np.float32, steps=1)
        update(optimizer, p, g, zeros(optimizer, p), 10**9, scale=1e300)
        assert not np.isfinite(p).any()


@pytest.mark.parametrize("optimizer", [Sgd(0.1, 0.9), Adam(0.1)])
def test_arrays_that_cannot_be_updated_in_place_are_refused(optimizer: Any) -> None:
    p, (g,) = sequence((6, 6), np.float32, steps=1)
    before = p.copy()
    with pytest.raises(ValueError, match="copy"):
        update(optimizer, p.T, g, zeros(optimizer, p), 0)
    with pytest.raises(ValueError, match=r"differ: \(6, 6\), \(36,\), \(6, 6\)"):
        update(optimizer, p, g.reshape(-1), zeros(optimizer, p), 0)
    states = {name: np.zeros(1, np.float32) for name in optimizer.states}
    with pytest.raises(ValueError, match=r"differ: \(6, 6\), \(6, 6\), \(1,\)"):
        update(optimizer, p, g, states, 0)
    assert np.array_equal(p, before)


def test_an_update_needs_little_memory_beside_its_arrays() -> None:
    optimizer = Adam(1e-3, weight_decay=0.1)
    p = np.ones(1 << 21, np.float32)
    g, states = np.ones_like(p), zeros(optimizer, p)
    tracemalloc.start()
    try:
        update(optimizer, p, g, states, 0, scale=0.5)
        sum_of_squares(g)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < p.nbytes / 8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "size", [0, 1, 1000, SUMMED_AT_ONCE, SUMMED_AT_ONCE + 1, 3 * SUMMED_AT_ONCE - 1]
)
def test_the_sum_of_squares_is_summed_in_float64(dtype: Any, size: int) -> None:
    g = drawn(size, dtype)
    total = sum_of_squares(g)
    assert isinstance(total, float)
    exact = math.fsum(float(element) ** 2 for element in g)
    assert total == pytest.approx(exact, rel=1e-14)


def test_the_sum_of_squares_loses_no_small_elements_beside_large_ones() -> None:
    g = np.array([4096.0, *[1e-3] * 9999], np.float32)
    exact = sum(Fraction(float(element)) ** 2 for element in g)
    assert sum_of_squares(g) == pytest.approx(float(exact), rel=1e-14)


def test_squares_of_float32_do_not_overflow() -> None:
    g = np.full(3, 3e38, np.float32)
    assert sum_of_squares(g) == 3 * float(g[0]) ** 2
    assert sum_of_squares(np.full(3, 1e200)) == math.inf


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nonfinite_element_makes_the_sum_of_squares_nonfinite(dtype: Any) -> None:
    for at in (0, SUMMED_AT_ONCE + 5):
        g = drawn(2 * SUMMED_AT_ONCE, dtype)
        for bad in (np.inf, -np.inf):
            g[at] = bad
            assert sum_of_squares(g) == math.inf
        g[-1] = np.nan
        assert math.isnan(sum_of_squares(g))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_of_squares_has_the_same_bits_wherever_the_elements_lie(
    dtype: Any,
) -> None:
    g = drawn(3 * SUMMED_AT_ONCE, dtype)
    expected = sum_of_squares(g)
    memory = np.empty(g.nbytes + 64, np.uint8)
    for offset in range(0, 64, g.itemsize):
        moved = memory[offset : offset + g.nbytes].view(dtype)
        moved[:] = g
        assert sum_of_squares(moved) == expected
        assert sum_of_squares(moved.reshape(3, -1)) == expected
