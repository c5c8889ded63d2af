"""Sessions whose tensors lie in a GPU's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import grpc
import numpy as np
import pytest

import gradwire
from gradwire_protocol.dtypes import ACCUMULATORS, Dtype
from gradwire_protocol.optimizers import Adam, Sgd
from gradwire_server.backends.numpy.kept_memory import HostMemory
from tests.contract.test_session_bits import bits, keeping
from tests.gpu.test_backend import make_backend
from tests.support import oracle
from tests.support.in_process import serving
from tests.support.raw import (
    DTYPES,
    Outcome,
    compute_job,
    normal_numbers,
    result,
    stream_job,
)
from tests.support.serving import ServerProcess
from tests.support.sessions import MIB, RawSessions, sent_and_kept, shared
from tests.support.shared_memory import RawRegion

KEEP_BYTES = 64 * MIB

OPTIMIZERS = [
    Sgd(0.1),
    Sgd(0.01, momentum=0.9, dampening=0.3, weight_decay=0.01),
    Sgd(0.01, momentum=0.9, weight_decay=0.1, nesterov=True),
    Adam(1e-2, beta1=0.3, beta2=0.99, weight_decay=0.1),
    Adam(1e-3, beta2=0.95, weight_decay=0.1, decoupled=True),
    Adam(1e-2, beta1=0.0, beta2=0.0, eps=0.1),
]


@pytest.fixture(scope="module")
def backend() -> Iterator[Any]:
    """A backend of the first device, whose device worker is this thread."""
    made = make_backend()
    yield made
    made.close()


@pytest.fixture
def memory(backend: Any) -> Iterator[Any]:
    """A session's memory on the device."""
    opened = backend.open_kept(KEEP_BYTES, 0)
    yield opened
    opened.close()


def put(memory: Any, array: Any) -> Any:
    kept = memory.allocate(array.shape, Dtype.of(array.dtype))
    memory.write(array.reshape(-1), kept, 0)
    return kept


def get(memory: Any, kept: Any) -> Any:
    out = memory.empty(kept.nbytes).view(kept.dtype.numpy)
    memory.read(kept, 0, out)
    return out.reshape(kept.shape).copy()


# Kept against sent.


@pytest.fixture(scope="module")
def channel(server: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as opened:
        yield opened


@pytest.fixture(params=["compute", "stream", "shared"])
def run(
    request: pytest.FixtureRequest, channel: grpc.Channel
) -> Iterator[Callable[..., Outcome]]:
    """Runs a job of a session in one of the three ways."""
    if request.param != "shared":
        yield lambda session, problem, **fields: getattr(session, request.param)(
            problem, **fields
        )
        return
    with RawRegion(channel, 8 * MIB) as region:
        yield lambda session, problem, **fields: shared(
            session, region, problem, **fields
        )


@pytest.mark.parametrize("block_rows", [None, 4, 64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(700, 130, 70), (900, 65, 33), (257, 512, 256)])
def test_kept_matrices_give_the_bits_of_sent_ones(
    channel: grpc.Channel,
    run: Callable[..., Outcome],
    shape: tuple[int, int, int],
    dtype: str,
    block_rows: int | None,
) -> None:
    """Also where the rows of a block do not begin at a multiple of 256 bytes."""
    problem = normal_numbers(*shape, dtype)
    wide = {"dw": "float64", "y": "float32"}
    for dtypes in ({}, wide):
        options: dict[str, Any] = {"block_rows": block_rows}
        options |= {name: result(each) for name, each in dtypes.items()}
        expected = stream_job(channel, problem, **options).bits
        if problem.x.nbytes + problem.w.nbytes + problem.dy.nbytes < 3 * MIB:
            assert compute_job(channel, problem, **options).bits == expected
        session = RawSessions(channel).open(32 * MIB)
        for names in (("w",), ("x", "dy"), ("x", "w", "dy", "dw")):
            fields = keeping(session, problem, names, **dtypes)
            outcome = run(session, problem, **(options | fields))
            sums = [name for name in names if name == "dw"]
            assert bits(session, outcome, *sums) == expected, names
        outcome = run(session, problem, x=sent_and_kept(20), **options)
        assert outcome.bits == expected
        assert session.get(20).tobytes() == problem.x.tobytes()
        session.close()


# Memory.


def test_nothing_of_others_can_be_read(backend: Any) -> None:
    opened = backend.open_kept(KEEP_BYTES, 0)
    full = np.full(KEEP_BYTES // 4, 3.0, np.float32)
    put(opened, full)
    opened.close()
    again = backend.open_kept(KEEP_BYTES, 0)
    assert not get(again, again.allocate(full.shape, Dtype.FLOAT32)).any()
    again.close()


@pytest.mark.parametrize("dtype", Dtype)
def test_arrays_are_read_written_copied_added_and_cleared(
    memory: Any, dtype: Dtype
) -> None:
    rng = np.random.default_rng(0)
    sizes = 10.0 ** rng.integers(-6, 5, (2, 3000, 101))
    one, other = (rng.standard_normal((2, 3000, 101)) * sizes).astype(dtype.numpy)
    kept, total = put(memory, one), put(memory, other)
    assert get(memory, kept).tobytes() == one.tobytes()
    memory.add(kept, total)
    with np.errstate(all="ignore"):
        assert get(memory, total).tobytes() == (other + one).tobytes()
    memory.copy(total, kept)
    assert get(memory, kept).tobytes() == get(memory, total).tobytes()
    memory.clear(kept, slice(10, kept.size))
    cleared = get(memory, kept).reshape(-1)
    assert not cleared[10:].any()
    assert cleared[:10].tobytes() == get(memory, total).reshape(-1)[:10].tobytes()


# Steps.


@pytest.mark.parametrize("scale", [1.0, 0.37])
@pytest.mark.parametrize("dtype", ACCUMULATORS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_updates_are_numpys(
    memory: Any, optimizer: Sgd | Adam, dtype: Dtype, scale: float
) -> None:
    """Every operation is rounded once, on both sides: the bits are the same."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((300, 257)).astype(dtype.numpy)
    gradients = [
        (rng.standard_normal(weight.shape) * 10.0 ** rng.integers(-22, 2)).astype(
            dtype.numpy
        )
        for _ in range(20)
    ]
    found = []
    for each in (HostMemory(), memory):
        p = put(each, weight)
        shadow = each.allocate(weight.shape, Dtype.BFLOAT16)
        states = {name: put(each, np.zeros_like(weight)) for name in optimizer.states}
        for made, g in enumerate(gradients):
            kept = put(each, g)
            for part in (slice(0, 40_000), slice(40_000, weight.size)):
                each.update(optimizer, p, kept, states, part, made=made, scale=scale)
            each.free(kept)
        if dtype is Dtype.FLOAT32:
            each.round(p, shadow, slice(0, weight.size))
        found.append([get(each, array) for array in (p, *states.values())])
        found[-1] += [get(each, shadow)] if dtype is Dtype.FLOAT32 else []
    for one, other in zip(*found, strict=True):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize(
    ("dtype", "size"), list(product(ACCUMULATORS, (1, 255, 256 * 1024 + 1, 3_000_001)))
)
def test_sums_of_squares_are_exact_enough_and_the_same_in_each_run(
    memory: Any, dtype: Dtype, size: int
) -> None:
    rng = np.random.default_rng(0)
    g = (rng.standard_normal(size) * 10.0 ** rng.integers(-9, 9, size)).astype(
        dtype.numpy
    )
    kept = put(memory, g)
    whole = slice(0, size)
    sums = {memory.sum_of_squares(kept, whole) for _ in range(20)}
    assert len(sums) == 1
    exact = HostMemory().sum_of_squares(put(HostMemory(), g), whole)
    assert abs(sums.pop() - exact) <= 1e-12 * exact
    for wrong in (np.nan, np.inf):
        g[-1] = wrong
        memory.write(g, kept, 0)
        assert not np.isfinite(memory.sum_of_squares(kept, whole))


def test_w_goes_to_the_device_once_in_a_hundred_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from gradwire_server.backends.cuda.backend import CupyBackend
    from gradwire_server.backends.cuda.device import CupyDevice

    uploads: list[int] = []
    upload = CupyDevice.upload

    def counted(device: Any, source: Any, to: int) -> None:
        uploads.append(source.nbytes)
        upload(device, source, to)

    monkeypatch.setattr(CupyDevice, "upload", counted)
    m, n, k = 64, 700, 500
    x, w, _ = oracle.operands(m, n, k)
    target = x @ (w + 1)
    exact = w.astype(np.float64)
    backend: Any = CupyBackend((0,))
    with (
        serving(backend) as server,
        gradwire.connect(server.addresses[0], timeout_s=60) as client,
        client.session(keep="8MiB") as session,
    ):
        kept = session.put(w)
        gradient = session.zeros_like(kept)
        assert sum(uploads) == w.nbytes
        uploads.clear()
        for _ in range(100):
            y, context = session.forward(x, kept)
            dy = (y - target) / m
            session.backward(context, dy, into=gradient)
            session.step(gradwire.SGD(lr=1e-2), {kept: gradient})
            exact -= 1e-2 * x.T.astype(np.float64) @ ((x @ exact - target) / m)
        # X and dY once a step, and never W, dW or an X that was kept.
        assert sum(uploads) == 100 * (x.nbytes + dy.nbytes)
        found = session.get(kept)
    np.testing.assert_allclose(found, exact, rtol=1e-3, atol=1e-3)
