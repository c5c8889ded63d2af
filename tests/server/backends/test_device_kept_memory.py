"""Kept tensors on a device whose streams run in any order that marks allow."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest

from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.job_spec import KeptOperand, KeptResult
from gradwire_protocol.matrices import Matrix
from gradwire_protocol.optimizers import Adam
from gradwire_server.backends.async_device.arena import ARRAYS, Arena, arena_bytes
from gradwire_server.backends.async_device.kept_memory import (
    DeviceKeptMemory,
    device_bytes,
)
from gradwire_server.backends.async_device.layout import make_layout
from gradwire_server.backends.base import empty_aligned
from gradwire_server.backends.kept_memory import NoPieceError
from gradwire_server.backends.numpy.kept_memory import HostMemory
from gradwire_server.backends.row_blocks import ALIGNMENT
from tests.server.backends.simulated_device import SimulatedDevice
from tests.server.backends.test_async_device_job import (
    blocks_of,
    open_job,
    room,
    run,
    run_all,
)
from tests.server.backends.test_numpy_backend import operands
from tests.server.specs import ALL, make_spec

X, W, DY, DW = Matrix.X, Matrix.W, Matrix.DY, Matrix.DW


def opened(device, keep_bytes=1 << 20):
    return DeviceKeptMemory(device, keep_bytes, empty_aligned)


def put(memory, array):
    kept = memory.allocate(array.shape, Dtype.of(array.dtype))
    if array.size:
        memory.write(array.reshape(-1), kept, 0)
    return kept


def get(memory, kept):
    out = np.empty(kept.size, kept.dtype.numpy)
    if out.size:
        memory.read(kept, 0, out)
    return out.reshape(kept.shape)


# The arena.


def test_places_do_not_overlap_and_come_back_whole() -> None:
    draw = random.Random(0)
    size = 1 << 20
    arena, places = Arena(ALIGNMENT, size), {}
    for _ in range(2000):
        if places and draw.random() < 0.48:
            address = draw.choice(list(places))
            del places[address]
            arena.give(address)
        else:
            wanted = draw.choice((0, 1, 255, 256, 257, 5000, 40_000))
            try:
                address = arena.take(wanted)
            except NoPieceError:
                continue
            places[address] = max(wanted, 1)
            assert address % ALIGNMENT == 0
        ends = [(start, start + taken) for start, taken in sorted(places.items())]
        assert all(end <= start for (_, end), (start, _) in pairwise(ends))
        assert not ends or (ends[0][0] >= ALIGNMENT and ends[-1][1] <= size + ALIGNMENT)
    for address in places:
        arena.give(address)
    assert arena.take(size) == ALIGNMENT


def test_small_arrays_and_one_large_array_fit_in_what_was_reserved() -> None:
    small, large = ARRAYS // 2, 10_000_001
    arena = Arena(0, arena_bytes(small + large))
    for _ in range(small):
        arena.take(1)
    arena.take(large)


# The memory.


def test_nothing_of_others_can_be_read() -> None:
    device = SimulatedDevice()  # whose memory is full of ones at first
    memory = opened(device)
    assert device.taken_bytes == device_bytes(1 << 20)
    assert not get(memory, memory.allocate((1 << 17,), Dtype.FLOAT64)).any()
    memory.close()
    assert device.taken_bytes == 0


@pytest.mark.parametrize("dtype", Dtype)
def test_arrays_are_read_written_copied_added_and_cleared(dtype) -> None:
    rng = np.random.default_rng(0)
    one, other = rng.standard_normal((2, 50, 7)).astype(dtype.numpy)
    memory = opened(SimulatedDevice())
    kept, total = put(memory, one), put(memory, other)
    assert get(memory, kept).tobytes() == one.tobytes()
    memory.write(other.reshape(-1)[:5], kept, 20)
    assert (
        get(memory, kept).reshape(-1)[20:25].tobytes()
        == other.tobytes()[: 5 * dtype.itemsize]
    )
    memory.add(kept, total)
    assert get(memory, total).tobytes() == (other + get(memory, kept)).tobytes()
    memory.copy(total, kept)
    assert get(memory, kept).tobytes() == get(memory, total).tobytes()
    memory.clear(kept, slice(10, 350))
    cleared = get(memory, kept).reshape(-1)
    assert not cleared[10:].any()
    assert cleared[:10].all()


def test_an_update_is_the_one_in_host_memory() -> None:
    rng = np.random.default_rng(0)
    arrays = rng.standard_normal((4, 30, 11)).astype(np.float32) ** 2
    found = []
    for memory in (HostMemory(), opened(SimulatedDevice())):
        p, g, m, v = (put(memory, array) for array in arrays)
        shadow = memory.allocate(p.shape, Dtype.BFLOAT16)
        squares = 0.0
        for part in (slice(0, 200), slice(200, 330)):
            squares += memory.sum_of_squares(g, part)
            states = {"exp_avg": m, "exp_avg_sq": v}
            memory.update(Adam(0.1), p, g, states, part, made=3, scale=0.5)
            memory.round(p, shadow, part)
        exact = float((arrays[1].astype(np.float64) ** 2).sum())
        assert abs(squares - exact) <= 1e-12 * exact
        found.append([get(memory, each).tobytes() for each in (p, g, m, v, shadow)])
    assert found[0] == found[1]


def test_memory_that_is_not_there_is_returned_at_once() -> None:
    device = SimulatedDevice()

    def fail(method):
        if method == "clear":
            raise MemoryError("none left")

    device.fail = fail
    with pytest.raises(MemoryError, match="none left"):
        opened(device)
    assert device.taken_bytes == 0


# Jobs.


def kept_run(spec, given, block_rows, names, *, keep=False, seed=0):
    """A job whose named operands are on the device, and dW stays there.

    With `keep`, rows are sent, and stay on the device.
    """
    device = SimulatedDevice(seed)
    memory = opened(device)
    arrays, kept, keeps = {}, {}, {}
    for matrix, array in zip((X, W, DY), given, strict=True):
        if matrix in names:
            if keep and matrix is not W:
                arrays[matrix] = memory.allocate(array.shape, spec.dtype)
                keeps[matrix] = int(matrix)
            else:
                arrays[matrix] = put(memory, array)
                kept[matrix] = KeptOperand(int(matrix))
    into = {DW: KeptResult(9)} if DW in spec.results else {}
    spec = replace(spec, session="one", kept=kept, keep=keeps, into=into)
    results = room(spec, len(given[0]))
    job = open_job(spec, block_rows, device, kept=arrays)
    assert device.taken_bytes == device_bytes(1 << 20) + (
        make_layout(spec, block_rows, 3).size_bytes
    )
    device.uploads.clear()

    def pieces():
        if W in spec.sent_operands:
            yield lambda: job.take_w(given[1])
        blocks = blocks_of(spec, given[0], given[2], results, block_rows)
        for number, sent in enumerate(blocks):
            block = replace(
                sent,
                first_row=number * block_rows,
                x=None if X in kept else sent.x,
                dy=None if DY in kept else sent.dy,
            )
            yield lambda block=block: job.compute_block(block)

    run_all(device, [pieces()])
    if into:
        results[DW] = get(memory, job.kept_sums()[DW])
    job.close()
    for matrix in keeps:
        sent = given[(X, W, DY).index(matrix)]
        assert get(memory, arrays[matrix]).tobytes() == sent.tobytes()
    memory.close()
    assert device.taken_bytes == 0
    assert device.marks_out == 0
    sent_bytes = sum(map(spec.size_bytes, spec.sent_operands))
    return results, sum(device.uploads) - sent_bytes


NAMES = [(X,), (W,), (DY,), (X, DY), (X, W, DY)]


@pytest.mark.parametrize("block_rows", [8, 64, 90])
@pytest.mark.parametrize("dtype", Dtype)
def test_kept_operands_give_the_bits_of_sent_ones(dtype, block_rows) -> None:
    """Where the rows of a block are aligned as they lie, and where they are not."""
    spec = make_spec(90, 7, 5, dtype, (Matrix.Y, Matrix.DX, DW))
    given = operands(spec, 90)
    expected = run(spec, given, block_rows)
    for seed, (names, keep) in enumerate(product(NAMES, (False, True))):
        found, copied = kept_run(spec, given, block_rows, names, keep=keep, seed=seed)
        assert copied == 0
        for matrix, array in expected.items():
            assert found[matrix].tobytes() == array.tobytes(), (matrix, names, keep)


@pytest.mark.parametrize(
    "shape", [(0, 7, 5), (90, 0, 5), (90, 7, 0), (0, 0, 0), (1, 1, 1)]
)
def test_matrices_without_elements_can_be_kept(shape) -> None:
    spec = make_spec(*shape, Dtype.FLOAT32, (Matrix.Y, Matrix.DX, DW))
    given = operands(spec, shape[0])
    block_rows = max(1, min(8, shape[0]))
    expected = run(spec, given, block_rows)
    for keep in (False, True):
        found, _ = kept_run(spec, given, block_rows, (X, W, DY), keep=keep)
        for matrix, array in expected.items():
            assert found[matrix].tobytes() == array.tobytes()


def test_a_job_takes_no_memory_for_operands_that_lie_there() -> None:
    spec = make_spec(64, 64, 64, Dtype.FLOAT32, ALL)
    kept = {matrix: KeptOperand(int(matrix)) for matrix in (X, W, DY)}
    spared = (
        make_layout(spec, 64, 3).size_bytes
        - make_layout(replace(spec, session="one", kept=kept), 64, 3).size_bytes
    )
    assert spared == 3 * 64 * 64 * 4
