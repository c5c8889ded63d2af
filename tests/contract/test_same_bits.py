"""The same job on the same server gives the same bits, whatever else happens."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

from tests.support.raw import (
    DTYPES,
    Outcome,
    Problem,
    Stream,
    compute_job,
    normal_numbers,
    stream_job,
)
from tests.support.serving import running_server

SHAPE = (550, 96, 80)


@pytest.fixture(scope="module")
def channel() -> Iterator[grpc.Channel]:
    """A server that cuts this module's jobs into blocks of 32 to 128 rows."""
    with (
        running_server(row_block_bytes=50_000) as server,
        grpc.insecure_channel(server.address) as opened,
    ):
        yield opened


@pytest.fixture(scope="module", params=DTYPES)
def problem(request) -> Problem:
    return normal_numbers(*SHAPE, request.param)


@pytest.fixture(scope="module")
def reference(channel, problem) -> Outcome:
    """The bits that Compute gives, alone on the server."""
    outcome = compute_job(channel, problem)
    assert outcome.receipt.blocks > 4
    return outcome


def test_the_last_bits_do_depend_on_how_rows_are_cut(reference, problem):
    # Otherwise nothing in this module would show anything.
    rows = reference.accepted.block_rows
    sums = problem.dtype if problem.x.itemsize > 2 else "float32"
    x, dy = problem.x.astype(DTYPES[sums]), problem.dy.astype(DTYPES[sums])
    cuts = [
        sum(x[b : b + step].T @ dy[b : b + step] for b in range(0, len(x), step))
        for step in (rows, 10)
    ]
    assert (cuts[0] != cuts[1]).any()


def test_compute_and_compute_stream(channel, problem, reference):
    assert stream_job(channel, problem).bits == reference.bits


@pytest.mark.parametrize("repetition", range(3))
def test_again(channel, problem, reference, repetition):
    assert compute_job(channel, problem).bits == reference.bits


def test_rows_known_only_at_the_end(channel, problem, reference):
    assert stream_job(channel, problem, open_m=True).bits == reference.bits


def test_the_rows_of_a_block_decide_the_bits_whoever_chose_them(channel, problem):
    """A server whose own blocks are as small gives the bits that a job asks for."""
    rows = 16
    asked = [
        compute_job(channel, problem, block_rows=rows),
        stream_job(channel, problem, block_rows=rows),
        stream_job(channel, problem, block_rows=rows, open_m=True),
    ]
    m, n, k = problem.shape
    row_bytes = (n + k) * problem.x.itemsize
    with (
        running_server(row_block_bytes=rows * row_bytes) as server,
        grpc.insecure_channel(server.address) as opened,
    ):
        own = stream_job(opened, problem)
    assert own.accepted.block_rows == rows
    assert [outcome.receipt.blocks for outcome in asked] == [-(-m // rows)] * 3
    assert all(outcome.bits == own.bits for outcome in asked)


@pytest.mark.thorough
@pytest.mark.parametrize("message_bytes", [500, 4096, 65_536, 1 << 20, 4 << 20])
def test_messages_of_any_size(channel, problem, reference, message_bytes):
    outcome = stream_job(
        channel, problem, message_bytes=message_bytes, max_chunk_bytes=message_bytes
    )
    assert outcome.bits == reference.bits


@pytest.mark.thorough
def test_messages_of_one_element(channel):
    problem = normal_numbers(70, 24, 8)
    expected = compute_job(channel, problem).bits
    outcome = stream_job(channel, problem, message_bytes=1, max_chunk_bytes=1)
    assert outcome.bits == expected


@pytest.mark.thorough
@pytest.mark.parametrize("turn_rows", [1, 7, 60])
def test_rows_in_turns_of_any_length(channel, problem, reference, turn_rows):
    outcome = stream_job(channel, problem, turn_rows=turn_rows, open_m=True)
    assert outcome.bits == reference.bits


def test_slow_arrival(channel, problem, reference):
    def slowly(messages):
        for message in messages:
            time.sleep(0.002)  # the slowness is what is tested
            yield message

    with Stream(channel) as stream:
        stream.send(problem.job())
        outcome = stream.receive_accepted()
        stream.send_all(slowly(problem.body(outcome.accepted.block_rows, 8192)))
        stream.half_close()
        assert stream.receive_results(outcome).bits == reference.bits


def test_one_result_or_all_of_them(channel, problem, reference):
    for name, bits in reference.bits.items():
        alone = Problem(problem.x, problem.w, problem.dy, (name,))
        assert stream_job(channel, alone).bits == {name: bits}


def test_beside_8_other_jobs(channel, problem, reference):
    others = [
        normal_numbers(400 + 50 * seed, 64 + 8 * seed, 40, dtype, seed)
        for seed, dtype in enumerate([*DTYPES, *DTYPES])
    ]
    enough = threading.Event()
    ran = [0] * len(others)

    def keep_running(number: int) -> None:
        while not enough.is_set():
            stream_job(channel, others[number])
            ran[number] += 1

    with ThreadPoolExecutor(len(others)) as pool:
        running = [pool.submit(keep_running, number) for number in range(len(others))]
        try:
            bits = [stream_job(channel, problem).bits for _ in range(3)]
            bits.append(compute_job(channel, problem).bits)
            while not all(ran):
                bits.append(stream_job(channel, problem).bits)
        finally:
            enough.set()
        for future in running:
            future.result()
    assert all(each == reference.bits for each in bits)


def test_the_results_are_right_within_what_the_arithmetic_allows(problem, reference):
    # |fl(a.b) - a.b| <= gamma(length) |a|.|b|, and one rounding of the result:
    # Higham, Accuracy and Stability of Numerical Algorithms, section 3.1.
    x, w, dy = (a.astype(np.float64) for a in (problem.x, problem.w, problem.dy))
    sums = DTYPES["float64" if problem.dtype == "float64" else "float32"]
    rounding = {"float16": 2**-11, "bfloat16": 2**-8}.get(problem.dtype, 0.0)
    for name, a, b in (("y", x, w), ("dx", dy, w.T), ("dw", x.T, dy)):
        exact = a @ b
        gamma = (a.shape[1] + 1) * np.finfo(sums).eps
        bound = gamma * (np.abs(a) @ np.abs(b)) + rounding * np.abs(exact) * 1.01
        error = np.abs(reference.arrays[name].astype(np.float64) - exact)
        assert (error <= bound).all()
