"""The CuPy backend by itself, without gRPC, against float64."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest

from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.job_spec import JobSpec
from gradwire_protocol.matrices import Matrix
from gradwire_server.backends.base import RowBlock, Times
from gradwire_server.backends.row_blocks import ALIGNMENT
from tests.gpu.blocks import Begun, Run, run
from tests.server.specs import ALL, make_spec
from tests.support import oracle

MIB = 1 << 20
NAMES = {matrix: matrix.label for matrix in ALL}
SHAPES = [(1, 1, 1), (37, 5, 3), (200, 17, 64), (64, 1, 30), (257, 257, 257)]


def make_backend(memory_limit: int | None = None) -> Any:
    from gradwire_server.backends.cuda.backend import CupyBackend

    backend = CupyBackend((0,), memory_limit)
    backend.init_thread(0)
    return backend


@pytest.fixture(scope="module")
def backend() -> Iterator[Any]:
    """A backend of the first device, whose device worker is this thread."""
    made = make_backend()
    yield made
    made.close()


def operands(spec: JobSpec, m: int, seed: int = 0) -> tuple[Any, Any, Any]:
    return oracle.operands(m, spec.n, spec.k, spec.dtype.label, seed)


def assert_right(spec: JobSpec, given: Sequence[Any], results: Any) -> None:
    label = spec.dtype.label
    exact = oracle.exact(*given)
    for matrix, array in results.items():
        name, dtype = NAMES[matrix], spec.results[matrix]
        allowed = oracle.bounds(*given, label, dtype.label, "cupy")[name]
        assert array.dtype == dtype.numpy
        error = np.abs(array.astype(np.float64) - exact[name])
        assert (error <= allowed).all(), name


def assert_same(actual: Any, expected: Any) -> None:
    for matrix, array in expected.items():
        assert oracle.same_bits(actual[matrix], array), matrix


@pytest.mark.parametrize(
    ("dtype", "result_dtype", "shape"), list(product(Dtype, Dtype, SHAPES))
)
def test_every_dtype_is_as_exact_as_its_sums_allow(
    backend: Any, dtype: Dtype, result_dtype: Dtype, shape: tuple[int, int, int]
) -> None:
    m, n, k = shape
    spec = make_spec(m, n, k, dtype, ALL, result_dtype)
    given = operands(spec, m)
    assert_right(spec, given, run(backend, spec, given, block_rows=16))


@pytest.mark.parametrize("dtype", [Dtype.FLOAT16, Dtype.BFLOAT16, Dtype.FLOAT32])
def test_a_float64_accumulator_sums_blocks_without_rounding_them(
    backend: Any, dtype: Dtype
) -> None:
    results = {}
    for accumulator in (Dtype.FLOAT32, Dtype.FLOAT64):
        spec = make_spec(
            None, 3, 2, dtype, (Matrix.DW,), Dtype.FLOAT64, accumulator=accumulator
        )
        x, w, dy = (np.ones(shape, dtype.numpy) for shape in ((9, 3), (3, 2), (9, 2)))
        x[0] = dy[0] = 4096
        results[accumulator] = run(backend, spec, (x, w, dy), block_rows=1)[Matrix.DW]
    assert (results[Dtype.FLOAT32] == 2**24).all()
    assert (results[Dtype.FLOAT64] == 2**24 + 8).all()


@pytest.mark.parametrize("wanted", [(matrix,) for matrix in ALL], ids=str)
@pytest.mark.parametrize("dtype", Dtype)
def test_one_result_has_the_bits_that_it_has_beside_the_others(
    backend: Any, dtype: Dtype, wanted: tuple[Matrix, ...]
) -> None:
    spec = make_spec(100, 60, 40, dtype)
    given = operands(spec, 100)
    alone = run(backend, make_spec(100, 60, 40, dtype, wanted), given, block_rows=32)
    assert set(alone) == set(wanted)
    together = run(backend, spec, given, block_rows=32)
    assert_same(alone, {matrix: together[matrix] for matrix in wanted})


def pageable(size_bytes: int) -> Any:
    return np.empty(size_bytes, np.uint8)


def misaligned(size_bytes: int) -> Any:
    """Where a message's bytes may begin: anywhere."""
    memory = np.empty(size_bytes + 2 * ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT + 2
    return memory[start : start + size_bytes]


@pytest.mark.parametrize("dtype", [Dtype.FLOAT16, Dtype.FLOAT32, Dtype.FLOAT64])
@pytest.mark.parametrize("empty", [pageable, misaligned])
def test_bits_do_not_depend_on_the_hosts_memory(
    backend: Any, dtype: Dtype, empty: Any
) -> None:
    """Pinned or not, aligned or not, one block after the other or several."""
    spec = make_spec(1000, 130, 70, dtype)
    given = operands(spec, 1000)
    expected = run(backend, spec, given, block_rows=64)
    assert_same(run(backend, spec, given, block_rows=64, empty=empty), expected)
    assert_same(run(backend, spec, given, block_rows=64, begun=1), expected)


def test_memory_for_the_host_is_aligned_writable_and_outlives_its_jobs(
    backend: Any,
) -> None:
    kept = [backend.empty(size) for size in (0, 1, 1000, 3 * MIB)]
    for size, memory in zip((0, 1, 1000, 3 * MIB), kept, strict=True):
        assert memory.dtype == np.uint8
        assert memory.shape == (size,)
        assert not size or memory.ctypes.data % ALIGNMENT == 0
        memory[...] = 7
    spec = make_spec(300, 64, 48)
    given = operands(spec, 300)
    assert_right(spec, given, run(backend, spec, given, block_rows=64))
    assert all((memory == 7).all() for memory in kept)


def test_operands_that_may_not_be_written_are_read(backend: Any) -> None:
    spec = make_spec(40, 33, 17)
    given = operands(spec, 40)
    expected = run(backend, spec, given, block_rows=64)
    x, w, dy = (np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape) for a in given)
    y, dx = (np.empty(shape, np.float32) for shape in ((40, 17), (40, 33)))
    job = backend.open_job(spec, 64, 0, times=Times())
    job.take_w(w)
    wait = job.compute_block(RowBlock(rows=40, x=x, dy=dy, y=y, dx=dx))
    if wait is not None:
        wait()
    sums = {matrix: np.array(array) for matrix, array in job.finish().items()}
    job.close()
    assert_same({Matrix.Y: y, Matrix.DX: dx, **sums}, expected)


@pytest.mark.parametrize("shape", list(product((0, 1, 3), repeat=3)), ids=str)
def test_zero_sizes_give_what_numpy_gives(
    backend: Any, shape: tuple[int, int, int]
) -> None:
    m, n, k = shape
    for dtype in Dtype:
        spec = make_spec(m, n, k, dtype)
        given = operands(spec, m)
        results = run(backend, spec, given, block_rows=2)
        for matrix in ALL:
            assert results[matrix].shape == matrix.shape(*shape)
        assert_right(spec, given, results)


def test_two_jobs_block_by_block_have_the_bits_that_they_have_alone(
    backend: Any,
) -> None:
    specs = [
        make_spec(256, 96, 80, Dtype.FLOAT32),
        replace(make_spec(256, 64, 72, Dtype.FLOAT32), allow_tf32=True),
        make_spec(256, 50, 30, Dtype.BFLOAT16, ALL, Dtype.FLOAT32),
    ]
    given = [operands(spec, 256, seed) for seed, spec in enumerate(specs)]
    alone = [
        run(backend, s, g, block_rows=64) for s, g in zip(specs, given, strict=True)
    ]
    for number in range(500):
        pair, in_flight = (number % 3, (number + 1) % 3), deque[Begun]()
        jobs = [Run(backend, specs[i], given[i], 64, in_flight=in_flight) for i in pair]
        for _ in range(256 // 64):
            assert all(job.step() for job in jobs)
        for each, job in zip(pair, jobs, strict=True):
            assert_same(job.finish(), alone[each])


def test_a_job_takes_no_more_of_the_devices_memory_than_was_said(backend: Any) -> None:
    import cupy

    free = cupy.cuda.runtime.memGetInfo
    spec = make_spec(4096, 4096, 4096, Dtype.FLOAT32, ALL, Dtype.FLOAT16)
    spec = replace(spec, dw_accumulator=Dtype.FLOAT64)
    given = operands(spec, 1)
    run(backend, spec, given, block_rows=1024)  # what is loaded when first used
    said = backend.device_bytes(spec, 1024)
    before = free()[0]
    job = Run(backend, spec, given, 1024)
    assert job.step()
    took = before - free()[0]
    job.finish()
    # Whole pages of 2 MiB; the pool may have kept some of it from before.
    assert took <= said + 32 * MIB
    # W, dW and its sum cannot be had for less.
    assert said >= 4096 * 4096 * (4 + 8)


def test_what_the_stages_took_is_told(backend: Any) -> None:
    spec = make_spec(2048, 512, 512)
    job = Run(backend, spec, operands(spec, 2048), 256)
    while job.step():
        pass
    job.finish()
    for stage in ("to_device_s", "computing_s", "from_device_s"):
        assert 0 < getattr(job.times, stage) < 60


def test_beyond_the_limit_is_a_memory_error_and_the_next_job_runs() -> None:
    limited = make_backend(64 * MIB)
    try:
        spec = make_spec(64, 4096, 4096)
        small = make_spec(64, 60, 40)
        given = operands(small, 64)
        expected = run(limited, small, given, block_rows=16)
        for _ in range(3):
            with pytest.raises(MemoryError):
                run(limited, spec, operands(spec, 64), block_rows=64)
            assert_same(run(limited, small, given, block_rows=16), expected)
    finally:
        limited.close()


def test_the_device_is_described(backend: Any) -> None:
    import cupy

    (device,) = backend.devices
    assert (device.backend, device.index) == ("cupy", 0)
    assert device.name
    assert device.memory_bytes <= cupy.cuda.runtime.memGetInfo()[1]
    assert device.library
    assert "cupy" in backend.libraries()
