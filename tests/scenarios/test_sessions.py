"""Training with tensors that stay on the server: the same bits, and once each."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import gradwire
from tests.support import oracle
from tests.support.observing import wait_until
from tests.support.proxy import Fault, Proxy
from tests.support.serving import ServerProcess, running_server

TRANSPORTS = ("grpc", "shm", "direct")


@pytest.fixture(scope="module")
def serving() -> Iterator[ServerProcess]:
    """A server with small row blocks, so that jobs have several."""
    with running_server(
        row_block_bytes=65536, allow_shared_memory=True, max_jobs=16
    ) as process:
        yield process


@pytest.fixture(params=TRANSPORTS)
def connected(
    request: pytest.FixtureRequest, serving: ServerProcess
) -> Iterator[gradwire.Client]:
    with gradwire.connect(
        serving.address, transport=request.param, timeout_s=60
    ) as client:
        yield client


def same(one: Any, other: Any) -> bool:
    return oracle.same_bits(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("sizes", [(6, 4, 3), (700, 90, 70)], ids=["small", "blocks"])
def test_kept_operands_give_the_bits_of_sent_ones(
    connected: gradwire.Client, dtype: str, sizes: tuple[int, int, int]
) -> None:
    x, w, dy = oracle.operands(*sizes, dtype)
    sent = connected.gradients(x, w, dy, results=("y", "dx", "dw", "db"))
    with connected.session("16MiB") as session:
        weight = session.put(w)
        gradient = session.zeros_like(weight)
        bias = session.zeros_like(session.put(np.zeros_like(dy[0])))
        y, context = session.forward(x, weight)
        dx = session.backward(context, dy, into=gradient, bias_into=bias)
        assert same(y, sent.y)
        assert same(dx, sent.dx)
        assert same(session.get(gradient), sent.dw)
        assert same(session.get(bias), sent.db)
        assert same(session.get(weight), w)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_a_transposed_weight_gives_the_gradients_of_its_own_layout(
    connected: gradwire.Client, dtype: str
) -> None:
    x, w, dy = oracle.operands(300, 40, 30, dtype)
    with connected.session("16MiB") as session:
        weight = session.put(np.ascontiguousarray(w.T))
        gradient = session.zeros_like(weight)
        y, context = session.forward(x, weight.T)
        dx = session.backward(context, dy, into=gradient)
        result = gradwire.Gradients(y, dx, session.get(gradient).T, None)  # type: ignore[arg-type]
    oracle.assert_right(result, x, w, dy, dtype)


def test_leading_dimensions_count_as_rows(connected: gradwire.Client) -> None:
    x, w, dy = oracle.operands(60, 7, 5)
    x, dy = x.reshape(3, 20, 7), dy.reshape(3, 20, 5)
    with connected.session("1MiB") as session:
        weight = session.put(w)
        gradient = session.zeros_like(weight)
        y, context = session.forward(x, weight)
        dx = session.backward(context, dy, into=gradient)
    assert y.shape == dy.shape
    assert dx.shape == x.shape


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_one_job_computes_everything_of_kept_and_sent_operands(
    connected: gradwire.Client, dtype: str
) -> None:
    x, w, dy = oracle.operands(300, 40, 30, dtype)
    sent = connected.gradients(x, w, dy, results=("y", "dx", "dw", "db"))
    with connected.session("16MiB") as session:
        kept = [session.put(each) for each in (x, w, dy)]
        pairs = list(zip((x, w, dy), kept, strict=True))
        for operands in list(itertools.product(*pairs))[1:]:
            got = session.gradients(*operands, results=("y", "dx", "dw", "db"))
            for name in ("y", "dx", "dw", "db"):
                assert same(getattr(got, name), getattr(sent, name))
        gradient = session.zeros_like(kept[1])
        bias = session.zeros_like(session.put(np.zeros_like(dy[0])))
        dx = np.empty_like(x)
        got = session.gradients(
            x, kept[1], dy, into=gradient, bias_into=bias, results="dx", out={"dx": dx}
        )
        assert got.dx is dx
        assert same(dx, sent.dx)
        assert (got.y, got.dw, got.db) == (None, None, None)
        assert same(session.get(gradient), sent.dw)
        assert same(session.get(bias), sent.db)
        with pytest.raises(gradwire.InputError, match="use the client's"):
            session.gradients(x, w, dy)
        session.gradients(kept[0], None, kept[2], into=gradient, results="dw")
        assert session.describe().tensors[3].parts == (0, 1)


def test_one_job_computes_everything_of_a_transposed_weight(
    connected: gradwire.Client,
) -> None:
    x, w, dy = oracle.operands(300, 40, 30)
    with connected.session("16MiB") as session:
        weight = session.put(np.ascontiguousarray(w.T))
        gradient = session.zeros_like(weight)
        dw = np.empty_like(w)
        got = session.gradients(x, weight.T, dy, out={"dw": dw})
        oracle.assert_right(got, x, w, dy, "float32")
        assert same(got.dw, dw)
        y, dx, nothing = session.gradients(x, weight.T, dy, into=gradient)
        assert nothing is None
        assert same(y, got.y)
        assert same(dx, got.dx)
        assert same(session.get(gradient), dw.T)
        for bad, match in (
            ({"results": "db"}, "W is transposed"),
            ({"into": weight, "out": dw}, "out is a ndarray: expected a mapping"),
            ({"out": {"bogus": dw}}, "bogus"),
        ):
            with pytest.raises(gradwire.InputError, match=match):
                session.gradients(x, weight.T, dy, **bad)
        for operands, match in (
            ((None, weight.T, dy), "x"),
            ((x[:, 1:], weight.T, dy), r"x's columns \(39\)"),
            ((x, weight, dy), "x has shape"),
        ):
            with pytest.raises(gradwire.InputError, match=match):
                session.gradients(*operands)


def test_a_kept_x_serves_several_layers_and_steps(connected: gradwire.Client) -> None:
    x, w, dy = oracle.operands(50, 7, 5)
    sent = connected.gradients(x, w, dy)
    with connected.session("1MiB") as session:
        rows, weight = session.put(x), session.put(w)
        gradient = session.zeros_like(weight)
        activation = session.forward(x, weight).context.x
        for kept in (rows, rows, activation, activation):
            session.clear(gradient)
            y, context = session.forward(kept, weight)
            dx = session.backward(context, session.put(dy), into=gradient)
            assert same(y, sent.y)
            assert same(dx, sent.dx)
            assert same(session.get(gradient), sent.dw)
        assert same(session.get(rows), x)


def test_a_transposed_tensor_in_the_place_of_rows_is_refused(
    connected: gradwire.Client,
) -> None:
    with connected.session("1MiB") as session:
        square = session.put(np.eye(4))
        context = session.forward(np.eye(4), square).context
        for w in (square, square.T):
            with pytest.raises(gradwire.InputError, match=r"^x is .*only a kept W"):
                session.forward(square.T, w)
        with pytest.raises(gradwire.InputError, match=r"^dy is .*only a kept W"):
            session.backward(context, square.T)


def test_the_operands_of_the_backward_pass_do_not_travel_again(
    serving: ServerProcess,
) -> None:
    x, w, dy = oracle.operands(700, 90, 70)
    with (
        gradwire.connect(serving.address, transport="grpc") as client,
        client.session("8MiB") as session,
    ):
        weight = session.put(w)
        gradient = session.zeros_like(weight)
        _, context = session.forward(x, weight)
        assert client.last_receipt is not None
        assert client.last_receipt.bytes_received == x.nbytes
        session.backward(context, dy, into=gradient)
        assert client.last_receipt.bytes_received == dy.nbytes
        assert client.last_receipt.bytes_sent == x.nbytes  # dX; dW stays


def test_gradients_add_up_until_a_step(connected: gradwire.Client) -> None:
    x, w, dy = oracle.operands(50, 7, 5)
    with connected.session("1MiB") as session:
        weight = session.put(w)
        gradient = session.zeros_like(weight)
        for _ in range(3):
            _, context = session.forward(x, weight)
            session.backward(context, dy, into=gradient, dx=False)
        one = connected.gradients(x, w, dy).dw
        assert same(session.get(gradient), one + one + one)
        result = session.step(gradwire.SGD(lr=0.5), {weight: gradient})
        assert result.step == 1
        assert not result.skipped
        stepped = session.get(weight)
        np.testing.assert_allclose(stepped, w - 0.5 * (3 * one), rtol=1e-6, atol=1e-6)
        assert not session.get(gradient).any()


def test_a_context_contributes_once(connected: gradwire.Client) -> None:
    x, w, dy = oracle.operands(50, 7, 5)
    with connected.session("1MiB") as session:
        weight = session.put(w)
        gradient = session.zeros_like(weight)
        _, context = session.forward(x, weight)
        first = session.backward(context, dy, into=gradient)
        again = session.backward(context, dy, into=gradient)  # X is sent again
        assert same(first, again)
        assert same(session.get(gradient), connected.gradients(x, w, dy).dw)


OPTIMIZERS = {
    "sgd": (gradwire.SGD(lr=0.1), {}),
    "momentum": (gradwire.SGD(lr=0.1, momentum=0.9), {}),
    "nesterov": (gradwire.SGD(lr=0.1, momentum=0.9, nesterov=True), {}),
    "decayed": (gradwire.SGD(lr=0.1, momentum=0.9, weight_decay=0.01), {}),
    "adam": (gradwire.Adam(lr=0.01, weight_decay=0.01), {}),
    "adamw": (gradwire.AdamW(lr=0.01), {"max_norm": 0.5}),
}


# By steps: the first, in which momentum would begin; two in a row; an overflow.
NOT_FINITE = {0: np.inf, 20: np.nan, 21: -np.inf, 70: 1e38, 98: np.nan}


@pytest.mark.parametrize(
    ("name", "scaled"),
    [
        *(pytest.param(name, False, id=name) for name in OPTIMIZERS),
        *(
            pytest.param(
                name,
                True,
                id=f"{name}-scaled",
                marks=[] if name in {"momentum", "adamw"} else pytest.mark.big,
            )
            for name in OPTIMIZERS
        ),
    ],
)
def test_steps_are_those_of_torch(
    serving: ServerProcess, name: str, scaled: bool
) -> None:
    torch = pytest.importorskip("torch")
    optimizer, options = OPTIMIZERS[name]
    kind = getattr(torch.optim, type(optimizer).__name__)
    values = {
        field: getattr(optimizer, field) for field in optimizer.__dataclass_fields__
    }
    rng = np.random.default_rng(0)
    w = rng.standard_normal((40, 30)).astype(np.float32)
    theirs = torch.nn.Parameter(torch.from_numpy(w.copy()))
    torchs = kind([theirs], **values, foreach=False)
    # No powers of 2, by which gradients would be divided without rounding.
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=1000.0, growth_factor=3.0, growth_interval=9, enabled=scaled
    )
    scales = set()
    with (
        gradwire.connect(serving.address, transport="grpc") as client,
        client.session("1MiB") as session,
    ):
        weight = session.put(w)
        gradient = session.zeros_like(weight)
        for step in range(100):
            x = rng.standard_normal((16, 40)).astype(np.float32) / 8
            dy = rng.standard_normal((16, 30)).astype(np.float32) / 8
            scale = scaler.scale(torch.ones(())).item()
            scales.add(scale)
            dy *= np.float32(scale)
            skipped = scaled and step in NOT_FINITE
            if skipped:
                dy[step % 16, step % 30] = NOT_FINITE[step]
                x[step % 16, 0] = 10  # 1e38 times which overflows
            _, context = session.forward(x, weight)
            session.backward(context, dy, into=gradient, dx=False)
            theirs.grad = torch.from_numpy(session.get(gradient))
            scaler.unscale_(torchs)
            norm = torch.nn.utils.clip_grad_norm_(
                [theirs], options.get("max_norm") or float("inf")
            ).item()
            result = session.step(
                optimizer,
                {weight: gradient},
                **options,
                inverse_scale=1 / scale,
                skip_nonfinite=scaled,
            )
            scaler.step(torchs)
            scaler.update()
            assert result.skipped == skipped
            assert result.step == step + 1
            if skipped:
                assert not np.isfinite([norm, result.total_norm]).any()
            else:
                assert result.total_norm == pytest.approx(norm, rel=1e-6)
        ours = session.get(weight)
        updates = session.describe().tensors[0].updates
    assert updates == 100 - scaled * len(NOT_FINITE)
    if "step" in torchs.state[theirs]:
        assert torchs.state[theirs]["step"] == updates
    assert len(scales) > 5 if scaled else scales == {1.0}
    expected = theirs.detach().numpy()
    off = np.linalg.norm(ours - expected) / np.linalg.norm(expected)
    print(name, "scaled" if scaled else "plain", f"{off:.1e}")
    assert off <= 2e-7


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_training_in_torch_goes_on_in_a_session(
    serving: ServerProcess, kind: str
) -> None:
    torch = pytest.importorskip("torch")
    options = {"lr": 0.1, "momentum": 0.9} if kind == "SGD" else {"lr": 0.1}
    parameter = torch.nn.Parameter(torch.ones(4, 3))
    theirs = getattr(torch.optim, kind)([parameter], **options)
    ours = getattr(gradwire, kind)(**options)
    x, dy = np.eye(4, dtype=np.float32), oracle.operands(4, 4, 3)[2]

    def step_there() -> None:
        parameter.grad = torch.from_numpy(dy.copy())
        theirs.step()

    for _ in range(3):
        step_there()
    with (
        gradwire.connect(serving.address, transport="grpc") as client,
        client.session("1MiB") as session,
    ):
        weight = session.put(parameter.detach())
        gradient = session.zeros_like(weight)
        for name, state in theirs.state[parameter].items():
            if name != "step":
                session.put_state(weight, name, state, updates=3)
        for replaced in (False, True):
            if replaced:
                with torch.no_grad():
                    parameter.fill_(2.0)
                session.put(
                    np.full((4, 3), 2, np.float32), replace=weight, keep_states=True
                )
            for _ in range(3):
                step_there()
                _, context = session.forward(x, weight)
                session.backward(context, dy, into=gradient, dx=False)
                session.step(ours, {weight: gradient})
            np.testing.assert_allclose(
                session.get(weight), parameter.detach().numpy(), rtol=1e-6
            )
        for updates in (0, True, 1.5):
            with pytest.raises(gradwire.InputError, match="updates"):
                session.put_state(weight, "exp_avg", dy, updates=updates)  # type: ignore[arg-type]
        with pytest.raises(gradwire.RequestError, match="velocity"):
            session.put_state(weight, "velocity", dy, updates=1)
        with pytest.raises(gradwire.InputError, match="replace"):
            session.put(dy, keep_states=True)


@pytest.mark.parametrize("keep", [False, True])
def test_steps_of_some_weights_leave_the_gradients_of_others(
    serving: ServerProcess, keep: bool
) -> None:
    x, w, dy = oracle.operands(50, 7, 5)
    with (
        gradwire.connect(serving.address, transport="grpc") as client,
        client.session("1MiB") as session,
    ):
        dw = client.gradients(x, w, dy).dw
        one, other = session.put(w), session.put(w)
        gradients = {each: session.zeros_like(each) for each in (one, other)}
        for turn in range(1, 4):
            for weight, gradient in gradients.items():
                _, context = session.forward(x, weight)
                session.backward(context, dy, into=gradient, dx=False)
            named = {one: gradients[one]}
            session.step(gradwire.SGD(lr=0.0), named, keep_gradients=keep)
            expected = sum([dw] * turn, np.zeros_like(dw))
            assert same(session.get(gradients[other]), expected)
            if keep:
                assert same(session.get(gradients[one]), expected)
        session.step(gradwire.SGD(lr=1.0), gradients)
        np.testing.assert_allclose(session.get(other), w - 3 * dw, rtol=1e-5, atol=1e-5)


def test_a_step_is_skipped_where_a_gradient_is_not_finite(
    serving: ServerProcess,
) -> None:
    x, w, dy = oracle.operands(50, 7, 5)
    with (
        gradwire.connect(serving.address) as client,
        client.session("1MiB") as session,
    ):
        weight, other = session.put(w), session.put(w)
        gradients = {each: session.zeros_like(each) for each in (weight, other)}
        for each, scale in ((weight, 1), (other, np.inf)):
            _, context = session.forward(x, each)
            rows = (dy * scale).astype(np.float32)
            session.backward(context, rows, into=gradients[each], dx=False)
        result = session.step(gradwire.Adam(), gradients, skip_nonfinite=True)
        assert result.skipped
        assert result.step == 1
        assert same(session.get(weight), w)
        assert not session.get(gradients[other]).any()
        assert all(each.updates == 0 for each in session.describe().tensors)


def test_a_16_bit_copy_follows_its_float32_weight(connected: gradwire.Client) -> None:
    x, w, dy = oracle.operands(50, 7, 5)
    with connected.session("1MiB") as session:
        weight = session.put(w, compute_dtype="bfloat16")
        gradient = session.zeros_like(weight)
        for _ in range(2):
            rounded = session.get(weight).astype(oracle.numpy_dtype("bfloat16"))
            sent = connected.gradients(
                x.astype(rounded.dtype),
                rounded,
                dy.astype(rounded.dtype),
                result_dtype="float32",
            )
            y, context = session.forward(x, weight, wire_dtype="bfloat16")
            assert y.dtype == np.float32
            result_dtype = {"dw": "float32"}
            session.backward(context, dy, into=gradient, result_dtype=result_dtype)
            assert same(session.get(gradient), sent.dw)
            session.step(gradwire.SGD(lr=0.1), {weight: gradient})


@pytest.mark.parametrize("turns", [12, pytest.param(50, marks=pytest.mark.big)])
def test_parts_give_the_same_bits_in_any_order(
    serving: ServerProcess, turns: int
) -> None:
    batches = [oracle.operands(40, 60, 50, seed=seed) for seed in range(4)]
    w = batches[0][1]
    bits, orders = set(), set()
    with gradwire.connect(serving.address, transport="grpc") as client:
        shares = [client.gradients(x, w, dy).dw for x, _, dy in batches]
        for turn in range(turns):
            rng = np.random.default_rng(turn)
            with client.session("4MiB") as session, ThreadPoolExecutor(4) as threads:
                weight = session.put(w)
                gradient = session.zeros_like(weight)
                contexts = [session.forward(x, weight)[1] for x, _, _ in batches]
                # Numbered in the order of the batches, whatever order they run in.
                for context in contexts:
                    session.contribution(gradient, context.parts)
                running = []
                ended: list[int] = []
                for index in rng.permutation(4):
                    time.sleep(rng.random() / 100)
                    dy = batches[index][2]
                    job = threads.submit(
                        session.backward, contexts[index], dy, into=gradient, dx=False
                    )
                    job.add_done_callback(
                        lambda _, index=index, ended=ended: ended.append(index)
                    )
                    running.append(job)
                for each in running:
                    each.result()
                bits.add(session.get(gradient).tobytes())
            orders.add(tuple(ended))  # its threads are over
    print(f"{turns} runs ended in {len(orders)} orders")
    assert len(orders) > 1
    assert bits == {sum(shares, np.zeros_like(w)).tobytes()}
    # The order matters to these bits, or this test would show nothing.
    assert sum(reversed(shares), np.zeros_like(w)).tobytes() not in bits


@pytest.mark.parametrize("streamed", [False, True])
def test_a_cut_connection_counts_a_contribution_once(
    serving: ServerProcess, streamed: bool
) -> None:
    x, w, dy = oracle.operands(300, 40, 30)
    patient = gradwire.RetryPolicy(initial_backoff_s=0.01, max_backoff_s=0.02)
    cuts: list[Fault] = [Fault("requests", cut_after_bytes=at) for at in (1, 900, 9000)]
    cuts += [Fault("responses", cut_after_bytes=at) for at in (1, 500, 9000, 47000)]
    # One message; or Accepted, dX of three row blocks, and the receipt.
    messages = range(1, 6) if streamed else (1,)
    cuts += [Fault("responses", cut_after_messages=at) for at in messages]
    with (
        Proxy(serving.address) as proxy,
        gradwire.connect(proxy.address, transport="grpc", retries=patient) as client,
    ):
        expected = client.gradients(x, w, dy)
        for fault in cuts:
            with client.session("4MiB") as session:
                weight = session.put(w)
                gradient = session.zeros_like(weight)
                y, context = session.forward(x, weight)
                before = proxy.faults
                proxy.arm(fault)
                dx = session.backward(context, dy, into=gradient, checksum=streamed)
                dw = session.get(gradient)
                assert proxy.faults == before + 1
                assert same(y, expected.y)
                assert same(dx, expected.dx)
                assert same(dw, expected.dw), fault


def test_a_session_whose_answer_is_lost_is_opened_once(serving: ServerProcess) -> None:
    patient = gradwire.RetryPolicy(initial_backoff_s=0.01, max_backoff_s=0.02)
    with (
        Proxy(serving.address) as proxy,
        gradwire.connect(proxy.address, transport="grpc", retries=patient) as client,
    ):
        for faults, cut in enumerate((1, 40, 80), 1):
            proxy.arm(Fault("responses", cut_after_bytes=cut))
            with client.session("1MiB"):
                assert proxy.faults == faults
                assert len(client.sessions()) == 1
            assert not client.sessions()


def test_a_put_whose_answer_is_lost_fits_a_full_session(serving: ServerProcess) -> None:
    w = np.arange(2_000_000, dtype=np.float32)  # answered while it is sent again
    patient = gradwire.RetryPolicy(initial_backoff_s=0.01, max_backoff_s=0.02)
    faults = [
        Fault("requests", cut_after_bytes=5_000_000),
        *(Fault("responses", cut_after_bytes=at) for at in (1, 40, 80)),
    ]
    options: Any = {"transport": "grpc", "retries": patient, "timeout_s": 60}

    async def put(proxy: Proxy) -> None:
        async with (
            gradwire.AsyncClient(proxy.address, **options) as client,
            client.session(w.nbytes) as session,
        ):
            for fault in faults:
                proxy.arm(fault)
                weight = await session.put(w)
                assert same(await session.get(weight), w)
                await session.drop(weight)
            with pytest.raises(gradwire.SessionFullError):  # at the first message
                await session.put(np.append(w, w))

    with Proxy(serving.address) as proxy:
        with (
            gradwire.connect(proxy.address, **options) as client,
            client.session(w.nbytes) as session,
        ):
            for fault in faults:
                proxy.arm(fault)
                weight = session.put(w)
                assert same(session.get(weight), w)
                session.drop(weight)
        asyncio.run(put(proxy))
        assert proxy.faults == 2 * len(faults)


def test_a_cut_step_is_made_once(serving: ServerProcess) -> None:
    x, w, dy = oracle.operands(30, 20, 10)
    patient = gradwire.RetryPolicy(initial_backoff_s=0.01, max_backoff_s=0.02)
    with (
        Proxy(serving.address) as proxy,
        gradwire.connect(proxy.address, transport="grpc", retries=patient) as client,
        client.session("1MiB") as session,
    ):
        weight = session.put(w)
        gradient = session.zeros_like(weight)
        dw = client.gradients(x, w, dy).dw
        expected = w
        for fault in [
            Fault("requests", cut_after_bytes=40),
            *(Fault("responses", cut_after_bytes=at) for at in (1, 20, 40, 80)),
            Fault("responses", cut_after_messages=1),
        ]:
            _, context = session.forward(x, weight)
            session.backward(context, dy, into=gradient, dx=False)
            proxy.arm(fault)
            session.step(gradwire.SGD(lr=1.0), {weight: gradient})
            stepped = session.get(weight)
            expected = expected - dw
            assert same(stepped, expected)
            # The activations of a session do not depend on its weights here.
        assert session.describe().step == session.step_count == 6


def test_a_weight_is_never_read_half_stepped(serving: ServerProcess) -> None:
    n = 512
    w = np.zeros((n, n), np.float32)
    x = np.eye(n, dtype=np.float32)[:64]
    steps = 15
    with (
        gradwire.connect(serving.address, transport="grpc") as client,
        client.session("32MiB") as session,
        ThreadPoolExecutor(3) as threads,
    ):
        weight = session.put(w)
        gradient = session.zeros_like(weight)
        ones = np.ones((1, n), np.float32)
        going = True

        def read(rows: int) -> set[float]:
            seen: set[float] = set()
            while going:
                y = session.forward(x[:rows], weight, keep=False).y
                assert y.min() == y.max(), "half of the weight was stepped"
                seen.add(float(y.max()))
            return seen

        readers = [threads.submit(read, rows) for rows in (1, 64)]
        try:
            for _ in range(steps):
                _, context = session.forward(ones, weight)
                session.backward(context, ones, into=gradient, dx=False)
                session.step(gradwire.SGD(lr=1.0), {weight: gradient})
        finally:
            going = False
        seen = [reader.result() for reader in readers]
        assert (session.get(weight) == -steps).all()
    assert all(len(values) > 2 for values in seen)


def test_a_file_gives_the_session_back(
    connected: gradwire.Client, tmp_path: Path
) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    x, w, dy = oracle.operands(50, 7, 5)
    path = tmp_path / "run.safetensors"

    def train(session: gradwire.Session, weight: gradwire.Tensor, steps: int) -> Any:
        gradient = session.zeros_like(weight)
        for _ in range(steps):
            _, context = session.forward(x, weight)
            session.backward(context, dy, into=gradient, dx=False)
            session.step(gradwire.AdamW(lr=0.01), {weight: gradient})
        return session.get(weight)

    with connected.session("1MiB") as session:
        weight = session.put(w, name="fc1", compute_dtype="bfloat16")
        train(session, weight, 3)
        session.save(path)
        expected = train(session, weight, 4)
    file = safetensors.load_file(path)
    assert set(file) == {"model/fc1", "exp_avg/fc1", "exp_avg_sq/fc1"}
    with connected.session("1MiB") as session:
        weight = session.restore(path)["fc1"]
        assert same(session.get(weight), file["model/fc1"])
        (info,) = session.describe().tensors
        assert info.updates == 3
        assert info.compute_dtype == "bfloat16"
        assert same(train(session, weight, 4), expected)


def test_what_cannot_be_saved_is_named(
    connected: gradwire.Client, tmp_path: Path
) -> None:
    pytest.importorskip("safetensors")
    path = tmp_path / "run.safetensors"
    with connected.session("1MiB") as session:
        session.put(np.zeros((2, 3), np.float32))
        with pytest.raises(gradwire.InputError, match="name"):
            session.save(path)
        assert not list(tmp_path.iterdir())
        path.write_bytes(b"not a file of tensors")
        with pytest.raises(gradwire.InputError, match="safetensors"):
            session.restore(path)
        with pytest.raises(FileNotFoundError):
            session.restore(tmp_path / "none")


def test_a_failing_restore_leaves_the_session_or_closes_it(
    serving: ServerProcess, tmp_path: Path
) -> None:
    pytest.importorskip("safetensors")
    path = tmp_path / "run.safetensors"
    w = np.ones((2, 3), np.float32)
    dy = np.ones((4, 3), np.float32)
    with gradwire.connect(serving.address, transport="grpc") as client:
        with client.session("1MiB") as session:
            pairs = {
                weight: session.zeros_like(weight)
                for weight in (
                    session.put(w, name="first"),
                    session.put(w + 1, name="second", compute_dtype="bfloat16"),
                )
            }
            for weight, gradient in pairs.items():
                _, context = session.forward(np.ones((4, 2), np.float32), weight)
                session.backward(context, dy, into=gradient, dx=False)
            session.step(ADAM, pairs)
            session.save(path)
            needed = session.describe().used_bytes - 2 * w.nbytes

        # Too small by a byte: nothing is put.
        with client.session(needed - 1) as session:
            with pytest.raises(gradwire.SessionFullError, match=f"{needed} bytes"):
                session.restore(path)
            assert not session.describe().tensors
        with client.session(needed) as session:
            assert len(session.restore(path)) == 2
            assert session.describe().used_bytes == needed
        # "second" is new, and is put first, with its two states.
        for at, error in (
            (0, ValueError("a failure")),
            (2, KeyboardInterrupt()),
            (3, ValueError("a failure")),
            (5, KeyboardInterrupt()),
        ):
            with client.session("1MiB") as session:
                weight = session.put(2 * w, name="first")
                before = session.describe()
                put, left = session._engine.put_tensor, iter(range(at))

                def failing(*args: Any, put: Any = put, left: Any = left) -> None:
                    if next(left, None) is None:
                        raise error  # noqa: B023
                    put(*args)

                expected: Any = type(error)
                if at == 3:
                    expected = gradwire.SessionLostError
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(session._engine, "put_tensor", failing)
                    with pytest.raises(expected):
                        session.restore(path)
                if at < 3:
                    assert session.describe() == before
                else:
                    assert not client.sessions()
                    with pytest.raises(gradwire.ClientStateError, match="closed"):
                        session.get(weight)


def test_a_full_session_says_what_it_needs(connected: gradwire.Client) -> None:
    x, w, dy = oracle.operands(50, 70, 50)
    with connected.session(3 * w.nbytes) as session:
        weight = session.put(w)
        gradient = session.zeros_like(weight)
        y, context = session.forward(x, weight)
        session.backward(context, dy, into=gradient)
        used = session.describe().used_bytes
        assert used == 2 * w.nbytes
        with pytest.raises(
            gradwire.SessionFullError, match="keeps at least 56000 bytes"
        ):
            session.step(gradwire.Adam(), {weight: gradient})
        assert session.describe().used_bytes == used
        session.step(gradwire.SGD(), {weight: gradient})
        assert y.shape == (50, 50)


def test_a_session_expires_without_its_client(serving: ServerProcess) -> None:
    with gradwire.connect(serving.address, transport="grpc") as client:
        session = client.session("1MiB", lease_s=1.0)
        session.open()
        weight = session.put(np.ones((2, 3), np.float32))
        time.sleep(1.5)  # the lease is renewed
        assert session.get(weight).all()
        assert session._lease is not None
        session._lease._repeater.close()
        time.sleep(1.6)
        with pytest.raises(gradwire.SessionLostError, match="lease_seconds"):
            session.get(weight)
        session.close()


def test_a_closed_session_says_so(connected: gradwire.Client) -> None:
    session = connected.session("1MiB")
    with pytest.raises(gradwire.ClientStateError, match="not open"):
        session.put(np.ones((2, 3)))
    with session:
        weight = session.put(np.ones((2, 3)))
    with pytest.raises(gradwire.ClientStateError, match="closed"):
        session.get(weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("2 gigs",), "keep"),
        ((0,), "keep"),
        ((True,), "keep"),
        (("0GiB",), "keep"),
        ((1 << 64,), "keep"),
        (("9" * 400,), "keep"),
        (("99999999999TiB",), "keep"),
    ],
)
def test_bad_sizes_are_named(
    connected: gradwire.Client, arguments: Any, message: str
) -> None:
    with pytest.raises(gradwire.InputError, match=message):
        connected.session(*arguments)


def test_bad_arguments_are_named(connected: gradwire.Client) -> None:
    x, w, dy = oracle.operands(50, 7, 5)
    with connected.session("1MiB") as session, connected.session("1MiB") as other:
        weight = session.put(w)
        with pytest.raises(gradwire.InputError, match="another session"):
            other.forward(x, weight)
        with pytest.raises(gradwire.InputError, match="x's columns"):
            session.forward(x[:, :3], weight)
        with pytest.raises(gradwire.InputError, match="x's columns"):
            session.forward(x, weight.T)
        with pytest.raises(gradwire.InputError, match="w is a ndarray"):
            session.forward(x, w)
        _, context = session.forward(x, weight)
        with pytest.raises(gradwire.InputError, match="dy's columns"):
            session.backward(context, x)
        with pytest.raises(gradwire.InputError, match="nothing"):
            session.backward(context, dy, dx=False)
        with pytest.raises(gradwire.InputError, match="context"):
            session.backward(session.forward(x, weight, keep=False).context, dy)
        with pytest.raises(gradwire.InputError, match="lr"):
            session.step(gradwire.SGD(lr=-1.0), {})
        with pytest.raises(gradwire.InputError, match="optimizer"):
            session.step("adam", {})  # type: ignore[arg-type]


def test_the_async_session_does_the_same(serving: ServerProcess) -> None:
    x, w, dy = oracle.operands(300, 40, 30)

    async def train() -> Any:
        async with (
            gradwire.AsyncClient(serving.address, timeout_s=60) as client,
            client.session("4MiB") as session,
        ):
            weight = await session.put(w)
            gradient = await session.zeros_like(weight)
            contexts = await asyncio.gather(
                *(session.forward(x, weight) for _ in range(4))
            )
            await asyncio.gather(
                *(
                    session.backward(each.context, dy, into=gradient)
                    for each in contexts
                )
            )
            results = await session.gradients(x, weight, dy)
            assert same(results.dw, (await client.gradients(x, w, dy)).dw)
            await session.step(gradwire.SGD(lr=0.25), {weight: gradient})
            return await session.get(weight)

    stepped = asyncio.run(train())
    with gradwire.connect(serving.address, transport="grpc") as client:
        dw = client.gradients(x, w, dy).dw
    np.testing.assert_allclose(stepped, w - dw, rtol=1e-5, atol=1e-5)


def test_contributions_after_clear_are_new_ones(connected: gradwire.Client) -> None:
    x, w, dy = oracle.operands(50, 7, 5)
    with connected.session("1MiB") as session:
        weight = session.put(w)
        gradient = session.zeros_like(weight)
        one, other = (session.forward(x, weight).context for _ in range(2))
        session.backward(one, dy, into=gradient)
        session.clear(gradient)
        for context in (other, one, other):  # the last one counts no more
            session.backward(context, dy, into=gradient)
        dw = connected.gradients(x, w, dy).dw
        assert same(session.get(gradient), dw + dw)


def test_gradients_go_on_over_steps_of_others(connected: gradwire.Client) -> None:
    x, w, dy = oracle.operands(50, 7, 5)
    sgd = gradwire.SGD(lr=1.0)
    with connected.session("1MiB") as session:
        mine, others = session.put(w), session.put(w)
        gradient, its = session.zeros_like(mine), session.zeros_like(others)
        before = session.forward(x, mine).context
        session.backward(before, dy, into=gradient)
        session.step(sgd, {others: its})
        session.backward(session.forward(x, mine).context, dy, into=gradient)
        session.step(sgd, {others: its})
        session.backward(session.forward(x, mine).context, dy, into=gradient)
        dw = connected.gradients(x, w, dy).dw
        assert same(session.get(gradient), dw + dw + dw)
        session.step(sgd, {mine: gradient})
        assert same(session.get(mine), w - (dw + dw + dw))
        with pytest.raises(gradwire.StepConflictError):
            session.backward(before, dy, into=gradient)


def test_kept_gradients_go_on_after_their_step(connected: gradwire.Client) -> None:
    x, w, dy = oracle.operands(50, 7, 5)
    with connected.session("1MiB") as session:
        weight = session.put(w)
        gradient = session.zeros_like(weight)
        for _ in range(2):
            session.backward(session.forward(x, weight).context, dy, into=gradient)
            session.step(gradwire.SGD(lr=0.0), {weight: gradient}, keep_gradients=True)
        dw = connected.gradients(x, w, dy).dw
        assert same(session.get(gradient), dw + dw)


def test_an_invalid_argument_leaves_no_gap_in_a_gradient(
    connected: gradwire.Client,
) -> None:
    x, w, dy = oracle.operands(50, 7, 5)
    with connected.session("1MiB") as session:
        weight = session.put(w)
        gradient = session.zeros_like(weight)
        _, context = session.forward(x, weight)
        with pytest.raises(gradwire.InputError, match="rows"):
            session.backward(context, dy[1:], into=gradient)
        session.backward(session.forward(x, weight).context, dy, into=gradient)
        session.step(gradwire.SGD(), {weight: gradient})


def test_dw_has_the_dtype_of_its_gradient(connected: gradwire.Client) -> None:
    x, w, dy = oracle.operands(50, 7, 5)
    expected = connected.gradients(
        x, w, dy, wire_dtype="bfloat16", result_dtype={"dw": "float32"}
    )
    with connected.session("1MiB") as session:
        for weight in (
            session.put(w, compute_dtype="bfloat16"),
            session.put(w.T.copy(), compute_dtype="bfloat16").T,
        ):
            gradient = session.zeros_like(weight)
            assert gradient.shape == weight.shape
            y, context = session.forward(
                x, weight, wire_dtype="bfloat16", result_dtype={"y": "float32"}
            )
            dx = session.backward(context, dy, into=gradient)
            np.testing.assert_allclose(session.get(gradient), expected.dw, rtol=1e-5)
            np.testing.assert_allclose(y, x @ w, rtol=0.1, atol=0.1)
            assert dx.shape == x.shape
            session.step(gradwire.SGD(), {weight: gradient})


def test_errors_of_a_transposed_weight_have_the_callers_names(
    connected: gradwire.Client,
) -> None:
    x, w, dy = oracle.operands(50, 7, 5)
    big = np.full_like(x, 1e30)
    with connected.session("1MiB") as session:
        weight = session.put(w.T.copy(), compute_dtype="float16").T
        _, context = session.forward(x, weight)
        for message, call in {
            "^x is float64": lambda: session.forward(x.astype(float), weight),
            "^x has 1e": lambda: session.forward(big, weight, wire_dtype="float16"),
            "^out's y ": lambda: session.forward(x, weight, out=np.empty(3)),
            "y needs x .* x is None": lambda: session.forward(None, weight),
            "has 'dx': .*, y$": lambda: session.forward(
                x, weight, result_dtype={"dx": "float32"}
            ),
            "^dy is float64": lambda: session.backward(context, dy.astype(float)),
            "^dy has shape .* and x ": lambda: session.backward(
                context, dy[1:], into=session.zeros_like(weight)
            ),
        }.items():
            with pytest.raises(gradwire.InputError, match=message):
                call()


def test_the_transpose_of_a_gradient_is_no_other_gradient(
    connected: gradwire.Client,
) -> None:
    x, w, dy = oracle.operands(50, 6, 6)
    with connected.session("1MiB") as session:
        weight = session.put(w)
        gradient = session.zeros_like(weight)
        _, context = session.forward(x, weight)
        with pytest.raises(gradwire.InputError, match="transposed"):
            session.backward(context, dy, into=gradient.T)
        with pytest.raises(gradwire.InputError, match="W is not transposed: pass into"):
            session.gradients(x, weight, dy, into=gradient.T)
        with pytest.raises(gradwire.InputError, match="transposed"):
            session.step(gradwire.SGD(), {weight: gradient.T})
        oblong = session.zeros_like(session.put(w[:, :2].copy()), name="oblong")
        session.clear(oblong.T)
        assert session.get(oblong).shape == (6, 2)


def test_kept_tensors_are_no_arrays_and_no_copies(connected: gradwire.Client) -> None:
    x, w, dy = oracle.operands(50, 7, 5)
    with connected.session("1MiB") as session:
        weight = session.put(w)
        _, context = session.forward(x, weight)
        for call in (
            lambda: connected.forward(x, weight),
            lambda: connected.gradients(x, weight, dy),
            lambda: list(connected.stream([(x, dy)], weight)),
            lambda: np.asarray(weight),
        ):
            with pytest.raises(gradwire.InputError, match="session"):
                call()
        for each in (session, weight, context):
            for take in (copy.copy, copy.deepcopy, pickle.dumps):
                with pytest.raises(TypeError, match="cannot be pickled or copied"):
                    take(each)
        assert len(repr(context)) < 200


def test_a_session_is_opened_once(connected: gradwire.Client) -> None:
    session = connected.session("1MiB")
    with session, pytest.raises(gradwire.ClientStateError, match="open already"):
        session.open()
    for again in (session.open, session.__enter__):
        with pytest.raises(gradwire.ClientStateError, match="closed"):
            again()
    session.close()
    assert not connected.sessions()


def test_the_child_of_a_fork_leaves_the_session_to_its_parent(
    serving: ServerProcess,
) -> None:
    w = np.ones((2, 3), np.float32)
    with (
        gradwire.connect(serving.address, timeout_s=20) as client,
        client.session("1MiB") as session,
    ):
        weight = session.put(w)
        child = os.fork()
        if not child:
            status = 1
            try:
                session.put(w)
            except gradwire.ClientStateError:
                session.close()
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        assert same(session.get(weight), w)


def dropped(client: gradwire.Client) -> None:
    sessions = [client.session("1MiB")]
    sessions[0].open()
    reference = weakref.ref(sessions[0])
    with pytest.warns(ResourceWarning, match="was dropped and not closed: use it as"):
        sessions.clear()
    gc.collect()
    assert reference() is None


def test_a_dropped_session_is_closed(serving: ServerProcess) -> None:
    with gradwire.connect(serving.address, transport="grpc") as client:
        dropped(client)
        wait_until(lambda: not client.sessions(), "the session is closed", 5)


def test_a_client_closes_its_dropped_sessions(serving: ServerProcess) -> None:
    with gradwire.connect(serving.address, transport="grpc") as observer:
        for _ in range(20):
            with gradwire.connect(serving.address, transport="grpc") as client:
                dropped(client)
            assert not observer.sessions()


async def test_a_dropped_asynchronous_session_is_closed(serving: ServerProcess) -> None:
    async with gradwire.AsyncClient(serving.address, transport="grpc") as client:
        sessions = [client.session("1MiB")]
        await sessions[0].open()
        with pytest.warns(ResourceWarning, match="was dropped and not closed"):
            sessions.clear()
        with gradwire.connect(serving.address, transport="grpc") as observer:
            await asyncio.to_thread(
                wait_until,
                lambda: not observer.sessions(),
                "the session is closed",
                timeout_s=5,
            )


@pytest.mark.parametrize("cancelled", ["open", "close"])
async def test_a_session_is_closed_whose_call_is_cancelled(
    serving: ServerProcess, cancelled: str
) -> None:
    async with gradwire.AsyncClient(serving.address, transport="grpc") as client:
        for turn in range(30):
            session = client.session("1MiB")
            if cancelled == "close":
                await session.open()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.0002 * turn):
                    await getattr(session, cancelled)()
                await session.close()
            assert not await client.sessions(), turn


async def test_a_client_whose_closing_is_cancelled_closes_its_sessions(
    serving: ServerProcess,
) -> None:
    async with gradwire.AsyncClient(serving.address, transport="grpc") as observer:
        for turn in range(5):
            client = gradwire.AsyncClient(serving.address, transport="grpc")
            sessions = [client.session("1KiB") for _ in range(5)]
            for each in sessions:
                await each.open()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.001 * turn):
                    await client.close()
            assert not await observer.sessions(), turn


@pytest.mark.parametrize("interrupted", ["open", "close"])
def test_a_session_is_closed_whose_call_is_interrupted(
    serving: ServerProcess, interrupted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gradwire.connect(serving.address, transport="grpc") as client:
        session = client.session("1MiB")
        if interrupted == "close":
            session.open()
        call = client._engine.session_call

        def interrupt(*args: Any) -> None:
            monkeypatch.undo()
            if interrupted == "open":
                call(*args)
            raise KeyboardInterrupt

        monkeypatch.setattr(client._engine, "session_call", interrupt)
        with pytest.raises(KeyboardInterrupt):
            getattr(session, interrupted)()
        assert not client.sessions()


def test_a_client_that_is_closed_closes_sessions_that_open_meanwhile(
    serving: ServerProcess,
) -> None:
    def open_many(client: gradwire.Client) -> None:
        sessions = []
        while True:
            sessions.append(client.session("1KiB"))
            sessions[-1].open()

    with (
        gradwire.connect(serving.address, transport="grpc") as observer,
        ThreadPoolExecutor(1) as pool,
    ):
        for turn in range(10):
            client = gradwire.Client(serving.address, transport="grpc")
            opening = pool.submit(open_many, client)
            time.sleep(0.01 + 0.002 * turn)
            client.close()
            with pytest.raises(gradwire.ClientStateError):
                opening.result(10)
            assert not observer.sessions()


async def test_an_asynchronous_client_does_so_too(serving: ServerProcess) -> None:
    async def open_many(client: gradwire.AsyncClient) -> None:
        sessions = []
        while True:
            sessions.append(client.session("1KiB"))
            await sessions[-1].open()

    async with gradwire.AsyncClient(serving.address, transport="grpc") as observer:
        for turn in range(10):
            client = gradwire.AsyncClient(serving.address, transport="grpc")
            opening = asyncio.create_task(open_many(client))
            await asyncio.sleep(0.01 + 0.002 * turn)
            await client.close()
            with pytest.raises(gradwire.ClientStateError):
                await asyncio.wait_for(opening, 10)
            assert not await observer.sessions()


def test_ctrl_c_does_not_wait_for_a_server_that_does_not_answer() -> None:
    def leave(session: gradwire.Session) -> None:
        with session:
            stopped.callback(os.kill, server.pid, signal.SIGCONT)
            os.kill(server.pid, signal.SIGSTOP)
            raise KeyboardInterrupt

    with running_server() as server, contextlib.ExitStack() as stopped:
        client = gradwire.Client(server.address, transport="grpc")
        session = client.session("1MiB")
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            leave(session)
        client.close()
        assert time.monotonic() - began < 5  # without an interrupt it is 10 s


class Interrupted:
    """Interrupts a session's calls of a method, as Ctrl-C does.

    Args:
        session: The session.
        when: Before the request is sent, or after it was answered.
    """

    def __init__(self, session: gradwire.Session, when: str) -> None:
        self._engine, self._call = session._engine, session._engine.session_call
        self._when = when

    def __enter__(self) -> None:
        def call(*args: Any) -> Any:
            if self._when == "after":
                self._call(*args)
            raise KeyboardInterrupt

        self._engine.session_call = call  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        self._engine.session_call = self._call  # type: ignore[method-assign]


ADAM = gradwire.Adam(lr=0.1)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("then", ["goes on", "repeats it", "makes another"])
def test_an_interrupted_step_is_made_once(
    serving: ServerProcess, when: str, then: str
) -> None:
    x, w, dy = oracle.operands(50, 7, 5)

    def train(session: gradwire.Session, interrupted: bool) -> Any:
        weight = session.put(w)
        gradient = session.zeros_like(weight)
        for step in range(4):
            _, context = session.forward(x + step, weight)
            session.backward(context, dy, into=gradient, dx=False)
            if interrupted and step == 2:
                with Interrupted(session, when), pytest.raises(KeyboardInterrupt):
                    session.step(ADAM, {weight: gradient})
                if then == "goes on":
                    continue
                if then == "makes another":
                    session.step(gradwire.SGD(), {weight: gradient})
                    session.step(ADAM, {weight: gradient})
                    assert session.step_count == 5
                    break
            result = session.step(ADAM, {weight: gradient})
            assert result.step == step + 1 == session.step_count
            if then == "makes another" and step == 2:
                break
        return session.get(weight)

    with (
        gradwire.connect(serving.address, transport="grpc") as client,
        client.session("1MiB") as one,
        client.session("1MiB") as other,
    ):
        assert same(train(one, interrupted=True), train(other, interrupted=False))


async def test_a_step_that_is_cancelled_anywhere_is_made_once(
    serving: ServerProcess,
) -> None:
    x, w, dy = oracle.operands(50, 7, 5)

    async def train(session: gradwire.AsyncSession, cancelled: bool) -> Any:
        weight = await session.put(w)
        gradient = await session.zeros_like(weight)
        for step in range(30):
            _, context = await session.forward(x + step, weight)
            await session.backward(context, dy, into=gradient, dx=False)
            task = asyncio.create_task(session.step(ADAM, {weight: gradient}))
            for _ in range(step + 1 if cancelled else 0):  # ever later
                await asyncio.sleep(0)
            if cancelled:
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        return await session.get(weight)

    async with (
        gradwire.AsyncClient(serving.address) as client,
        client.session("1MiB") as one,
        client.session("1MiB") as other,
    ):
        assert same(await train(one, True), await train(other, False))
        assert one.step_count == 30


def test_a_session_ends_with_its_client(serving: ServerProcess) -> None:
    w = np.ones((2, 3), np.float32)
    with gradwire.connect(serving.address) as watcher:
        client = gradwire.connect(serving.address)
        sessions = [client.session("1MiB") for _ in range(2)]
        for session in sessions:
            session.open()
        weight = sessions[0].put(w)
        assert len(watcher.sessions()) == 2
        client.close()
        assert not watcher.sessions()
        with pytest.raises(gradwire.ClientStateError, match="closed"):
            sessions[0].get(weight)
        sessions[0].close()

        def fail() -> None:
            with gradwire.connect(serving.address) as client:
                session = client.session("1MiB")
                session.open()
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        assert not watcher.sessions()

        async def begin() -> None:
            async with gradwire.AsyncClient(serving.address) as client:
                session = client.session("1MiB")
                await session.open()
                assert watcher.sessions()

        asyncio.run(begin())
        assert not watcher.sessions()


def test_a_session_ends_with_its_program(serving: ServerProcess) -> None:
    program = """
import sys, gradwire
client = gradwire.connect(sys.argv[1])
session = client.session("1MiB")
session.open()
print(len(client.sessions()), flush=True)
raise SystemExit("an error")
"""
    done = subprocess.run(
        [sys.executable, "-c", program, serving.address],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "1\n", "an error\n")
    with gradwire.connect(serving.address) as client:
        assert not client.sessions()


def test_bad_step_options_are_named(connected: gradwire.Client) -> None:
    sgd = gradwire.SGD()
    with connected.session("1MiB") as session:
        weight = session.put(np.ones((2, 3), np.float32))
        pairs = {weight: session.zeros_like(weight)}
        for name, value in (
            ("max_norm", "1"),
            ("max_norm", float("nan")),
            ("local_sum_of_squares", -1),
            ("inverse_scale", 0),
            ("inverse_scale", float("inf")),
            ("skip_nonfinite", "no"),
            ("keep_gradients", None),
        ):
            with pytest.raises(gradwire.InputError, match=name):
                session.step(sgd, pairs, **{name: value})
        with pytest.raises(gradwire.InputError, match="pair"):
            session.step(sgd, pairs, pairs)  # type: ignore[arg-type]
        with pytest.raises(gradwire.InputError, match="state"):
            session.get(weight, state=5)  # type: ignore[arg-type]
        assert session.step_count == 0


def test_a_replaced_weight_keeps_its_name(connected: gradwire.Client) -> None:
    w = np.ones((2, 3), np.float32)
    with connected.session("1MiB") as session:
        weight = session.put(w, name="fc1")
        assert session.put(w, replace=weight).name == "fc1"
        assert session.put(w, replace=weight, name="fc2").name == "fc2"
        (info,) = session.describe().tensors
        assert info.name == "fc2"


@pytest.mark.parametrize(
    "about",
    [
        '["fc1"]',
        "null",
        "[" * 100_000,
        '{"fc1": {"updates": -1}}',
        '{"fc1": {"updates": Infinity}}',
        '{"fc1": {"updates": 18446744073709551616}}',
        '{"fc1": {}}',
        '{"fc1": 5}',
        "{}",
    ],
    ids=range(9),
)
def test_files_with_wrong_metadata_are_refused(
    connected: gradwire.Client, tmp_path: Path, about: str
) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "run.safetensors"
    w = np.ones((2, 3), np.float32)
    metadata = {
        "formulas": "gradwire.v1",
        "tensors": json.dumps({"fc1": {"updates": 0}}),
    }
    safetensors.save_file({"model/fc1": w}, path, metadata)
    with connected.session("1MiB") as session:
        assert same(session.get(session.restore(path)["fc1"]), w)
        safetensors.save_file({"model/fc1": w}, path, metadata | {"tensors": about})
        with pytest.raises(gradwire.InputError, match="not a session's"):
            session.restore(path)


@pytest.mark.parametrize("size", [6, 4_000_000])
def test_a_put_without_a_server_says_so(size: int) -> None:
    array = np.ones(size, np.float32)
    with running_server() as server:
        client = gradwire.connect(server.address, retries=False, transport="grpc")
        session = client.session("64MiB")
        session.open()
    with client:
        for _ in range(10):
            with pytest.raises((gradwire.ConnectError, gradwire.UnavailableError)):
                session.put(array)
        session.close()


def test_a_server_without_sessions_is_named(serving: ServerProcess) -> None:
    offered = grpc.insecure_channel(serving.address)

    class Earlier(grpc.GenericRpcHandler):
        """A server before there were sessions."""

        def service(self, details: Any) -> Any:
            method = details.method
            if "SessionService" in method:
                return None
            return grpc.unary_unary_rpc_method_handler(
                lambda request, _: offered.unary_unary(method)(request, timeout=10)
            )

    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((Earlier(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with gradwire.connect(f"127.0.0.1:{port}", transport="grpc") as client:
            for call in (client.session("1MiB").open, client.sessions):
                with pytest.raises(
                    gradwire.UnsupportedError,
                    match=r"does not offer.*Session",
                ):
                    call()
    finally:
        server.stop(None).wait()
        offered.close()


def test_an_async_session_may_be_closed_after_its_loop(serving: ServerProcess) -> None:
    async def begin() -> gradwire.AsyncSession:
        client = gradwire.AsyncClient(serving.address)
        session = client.session("1MiB", lease_s=1.0)
        await session.open()
        await client.close()
        return session

    session = asyncio.run(begin())
    asyncio.run(session.close())


def test_blocks_of_a_session_can_be_smaller(serving: ServerProcess) -> None:
    x, w, dy = oracle.operands(256, 40, 30)
    with (
        gradwire.connect(serving.address, transport="grpc") as client,
        client.session("4MiB") as session,
    ):
        weight = session.put(w)
        gradient = session.zeros_like(weight)
        y, context = session.forward(x, weight, block_rows=64)
        assert client.last_receipt is not None
        assert client.last_receipt.block_rows == 64
        session.backward(context, dy, into=gradient, block_rows=64)
        assert client.last_receipt.blocks == 4
        sent = client.gradients(x, w, dy, block_rows=64)
        assert same(y, sent.y)
        assert same(session.get(gradient), sent.dw)
