"""What of the CuPy backend can be seen without a GPU."""

from __future__ import annotations

import subprocess
import sys
from itertools import product

import numpy as np
import pytest

from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.job_spec import BufferRef
from gradwire_protocol.matrices import Matrix
from gradwire_server.backends.async_device.job import DeviceJob
from gradwire_server.backends.base import DeviceLostError, Times
from gradwire_server.backends.cuda.backend import PIPELINE_DEPTH, CupyBackend
from gradwire_server.backends.cuda.memory_pool import Pool, rounded_up
from gradwire_server.backends.cuda.pinned import empty_pinned
from tests.server.backends.simulated_device import SimulatedDevice
from tests.server.backends.test_async_device_job import pieces_of, room, run_all
from tests.server.backends.test_memory_pool import System
from tests.server.backends.test_numpy_backend import operands
from tests.server.specs import ALL, make_spec


@pytest.fixture
def cuda():
    """CuPy's CUDA, if it and CUDA's libraries are installed."""
    cuda = pytest.importorskip("cupy", exc_type=ImportError).cuda
    try:
        cuda.cublas  # noqa: B018 - it is loaded when it is asked for
    except ImportError as error:
        pytest.skip(str(error))
    return cuda


@pytest.fixture
def errors(cuda):
    from gradwire_server.backends.cuda import errors

    return errors


class Outcome(list):
    """What was done about an error."""

    def free(self):
        self.append("freed")

    def probe(self):
        self.append("probed")


def test_cupy_is_not_imported_until_a_backend_is_made():
    code = (
        "import sys, gradwire_server.backends.cuda.backend; "
        "sys.exit(any(name.partition('.')[0] in {'cupy', 'cupy_backends'} "
        "for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_a_device_the_error_is_cuda_s(cuda):
    try:
        count = cuda.runtime.getDeviceCount()
    except cuda.runtime.CUDARuntimeError:
        count = 0
    if count:
        pytest.skip("there is a device")
    with pytest.raises(DeviceLostError, match="cudaError"):
        CupyBackend()


def test_no_memory_on_the_device_is_a_memory_error_and_frees_what_is_kept(cuda, errors):
    for error in (
        cuda.memory.OutOfMemoryError(10, 20),
        MemoryError("the pool's own"),
        cuda.runtime.CUDARuntimeError(2),
        cuda.cublas.CUBLASError(3),
        cuda.cublas.CUBLASError(1),
    ):
        outcome = Outcome()
        with (
            pytest.raises(MemoryError) as raised,
            errors.translated(outcome.free, outcome.probe),
        ):
            raise error
        assert type(raised.value) is MemoryError
        assert "freed" in outcome


def test_an_error_that_poisons_the_context_means_the_device_is_lost(cuda, errors):
    for status in errors.LOST:
        with (
            pytest.raises(DeviceLostError, match="cudaError"),
            errors.translated(Outcome().free, Outcome().probe),
        ):
            raise cuda.runtime.CUDARuntimeError(status)


@pytest.mark.parametrize("status", [1, 3, 13, 14])
def test_cublas_s_own_errors_are_asked_of_the_device(cuda, errors, status):
    """cuBLAS says that it failed, not whether anything will work again."""

    def lost():
        raise cuda.runtime.CUDARuntimeError(700)

    with (
        pytest.raises(DeviceLostError, match="cudaErrorIllegalAddress"),
        errors.translated(Outcome().free, lost),
    ):
        raise cuda.cublas.CUBLASError(status)


def test_other_errors_stay_what_they_are(cuda, errors):
    for error in (
        cuda.runtime.CUDARuntimeError(1),
        cuda.cublas.CUBLASError(7),
        ValueError("ours"),
    ):
        outcome = Outcome()
        with (
            pytest.raises(type(error)) as raised,
            errors.translated(outcome.free, outcome.probe),
        ):
            raise error
        assert raised.value is error
        assert "freed" not in outcome


def test_the_numbers_of_errors_are_cuda_s(cuda, errors):
    """The names beside them, and what CUDA says of the list as a whole."""
    names = {
        status: str(cuda.runtime.CUDARuntimeError(status)).partition(":")[0]
        for status in errors.LOST | errors.MEMORY
    }
    assert names[2] == "cudaErrorMemoryAllocation"
    assert names[214] == "cudaErrorECCUncorrectable"
    assert names[719] == "cudaErrorLaunchFailure"
    unknown = {s for s, name in names.items() if "unrecognized" in name.lower()}
    assert not unknown


class Bare(CupyBackend):
    """The backend's arithmetic, without the libraries that it drives."""

    def __init__(self):
        pass


@pytest.mark.parametrize(
    ("dtype", "result_dtype", "accumulator", "in_place"),
    list(product(Dtype, Dtype, (None, Dtype.FLOAT64), (False, True))),
)
def test_a_job_takes_the_memory_that_was_said(
    dtype, result_dtype, accumulator, in_place
):
    places = {Matrix.DW: BufferRef(region=0, offset=0)} if in_place else None
    spec = make_spec(50, 300, 200, dtype, ALL, result_dtype, accumulator, places=places)
    given = operands(spec, 50)
    host, device = System(), SimulatedDevice()
    pool = Pool(host.allocate, max_free_bytes=0)
    sums = {
        result: np.empty(result.shape(50, 300, 200), result_dtype.numpy)
        for result in spec.sums
    }
    job = DeviceJob(
        spec,
        16,
        PIPELINE_DEPTH,
        device,
        times=Times(),
        empty=lambda size_bytes: empty_pinned(pool, size_bytes),
        sums=sums if in_place else None,
    )
    assert Bare().device_bytes(spec, 16) == rounded_up(device.taken_bytes)
    run_all(device, [pieces_of(spec, job, given, room(spec, 50), 16)])
    for result, array in job.finish().items():
        assert array.nbytes == spec.size_bytes(result)
    assert Bare().job_bytes(spec, 16) == host.taken_bytes
    assert device.taken_bytes <= Bare().device_bytes(spec, 16)
    job.close()
