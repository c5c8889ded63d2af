"""The CUDA source that rounds sums: as NVRTC reads it, and its arithmetic."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from itertools import product

import ml_dtypes
import numpy as np
import pytest

from gradwire_protocol.dtypes import ACCUMULATORS, Dtype
from gradwire_protocol.optimizers import Adam, Sgd
from gradwire_server.backends.async_device.layout import make_layout
from gradwire_server.backends.cuda.kernels import (
    FUNCTIONS,
    JOB_KERNELS,
    SESSION_KERNELS,
    THREADS,
    added_name,
    grid,
    kernel_name,
    source_of,
    squares_name,
    update_name,
)
from gradwire_server.backends.numpy.updates import sum_of_squares, update
from gradwire_server.backends.update_scalars import AdamScalars, SgdScalars
from tests.server.specs import ALL, make_spec

UPDATES = [
    Sgd(0.1),
    Sgd(0.01, momentum=0.9, dampening=0.3, weight_decay=0.01),
    Sgd(0.01, momentum=0.9, weight_decay=0.1, nesterov=True),
    Adam(1e-2, beta1=0.3, beta2=0.99, weight_decay=0.1),
    Adam(1e-3, beta2=0.95, weight_decay=0.1, decoupled=True),
    Adam(1e-2, beta1=0.0, beta2=0.0, eps=0.1),
]

KERNELS = {
    *map(added_name, Dtype),
    *map(squares_name, ACCUMULATORS),
    *(update_name(*each) for each in product((UPDATES[0], UPDATES[3]), ACCUMULATORS)),
    *(
        kernel_name(source, to, add=False)
        for source, to in product((Dtype.FLOAT32, Dtype.FLOAT64), Dtype)
        if source is not to
    ),
    kernel_name(Dtype.FLOAT32, Dtype.FLOAT64, add=True),
}


def test_there_is_a_kernel_for_whatever_a_job_has_to_convert():
    for dtype, result, accumulator in product(Dtype, Dtype, Dtype):
        if accumulator.itemsize < dtype.sums_in.itemsize:
            continue
        spec = make_spec(None, 3, 5, dtype, ALL, result, accumulator)
        layout = make_layout(spec, 4, 3)
        if layout.unrounded is not None:
            assert kernel_name(dtype.sums_in, result, add=False) in KERNELS
        for place in layout.sums.values():
            if place.rounded is not None:
                assert kernel_name(accumulator, result, add=False) in KERNELS
            if accumulator is dtype.sums_in:
                assert added_name(accumulator) in KERNELS
            elif place.share is not None:
                for add in (False, True):
                    assert kernel_name(dtype.sums_in, accumulator, add=add) in KERNELS


def test_a_grid_covers_every_element_and_stays_within_cuda_s_limits():
    assert grid(1) == 1
    assert grid(THREADS + 1) == 2
    assert 1 <= grid(2**62) <= 2**31 - 1


@pytest.mark.parametrize("architecture", ["75", "80", "90"])
def test_nvrtc_compiles_every_kernel_without_headers(architecture):
    nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc", exc_type=ImportError)
    try:
        nvrtc.getVersion()
    except (ImportError, RuntimeError) as error:  # CUDA's library is not installed
        pytest.skip(str(error))
    cubins = {}
    for source in {source_of(name) for name in KERNELS}:
        program = nvrtc.createProgram(source, "kernels.cu", (), ())
        try:
            nvrtc.compileProgram(program, (f"-arch=sm_{architecture}",))
            cubins[source] = nvrtc.getCUBIN(program)
        finally:
            nvrtc.destroyProgram(program)
    for name in KERNELS:
        cubin = cubins[source_of(name)]
        assert b"\0.text." + name.encode() + b"\0" in cubin


ON_A_CPU = r"""
#include <math.h>
#include <string.h>
#define __device__
#define __forceinline__ inline
#define __global__
#define __shared__ static
#define __syncthreads()
struct { unsigned x; } blockIdx, blockDim = {1}, threadIdx, gridDim = {1};
static unsigned __float_as_uint(float value) {
    unsigned bits; memcpy(&bits, &value, 4); return bits;
}
static float __uint_as_float(unsigned bits) {
    float value; memcpy(&value, &bits, 4); return value;
}
static float toward_zero(double value) {
    float near = (float)value;
    return fabs((double)near) > fabs(value) ? nextafterf(near, 0.0f) : near;
}
static unsigned short half_bits(double value) {
    (void)value; return 0; /* an instruction of the GPU alone */
}
static float half_value(unsigned short bits) { return bits; }
"""

INSTRUCTIONS = {
    "cvt.f64.f32": "wide = value;",
    "cvt.rn.f32.f64": "narrow = (float)value;",
    "cvt.rn.f16.f32": "bits = half_bits(value);",
    "cvt.rn.f16.f64": "bits = half_bits(value);",
    "cvt.rz.f32.f64": "cut = toward_zero(value);",
    "cvt.f32.f16": "value = half_value(bits);",
    **{
        f"{name}.rn.{kind}": f"out = {meaning};"
        for kind, root in (("f32", "sqrtf"), ("f64", "sqrt"))
        for name, meaning in (
            ("add", "a + b"),
            ("sub", "a - b"),
            ("mul", "a * b"),
            ("div", "a / b"),
            ("sqrt", f"{root}(a)"),
        )
    },
}


@pytest.fixture(scope="module")
def on_a_cpu(tmp_path_factory):
    """The kernels in C++, each PTX instruction replaced by what it means."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")

    def meaning(found):
        return INSTRUCTIONS[found[1]]

    source = FUNCTIONS + JOB_KERNELS + SESSION_KERNELS
    source, count = re.subn(r'asm\("([\w.]+) [^;]*;"[^;]*;', meaning, source)
    assert count == len(INSTRUCTIONS)
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "kernels.cpp").write_text(ON_A_CPU + source)
    subprocess.run(
        [
            compiler,
            "-shared",
            "-fPIC",
            "-O1",
            "-ffp-contract=off",
            "kernels.cpp",
            "-o",
            "kernels.so",
        ],
        cwd=folder,
        check=True,
        timeout=100,
    )
    return ctypes.CDLL(folder / "kernels.so")


def convert(library, source, to, name):
    getattr(library, name)(
        ctypes.c_void_p(source.ctypes.data),
        ctypes.c_void_p(to.ctypes.data),
        ctypes.c_uint64(source.size),
    )


def interesting():
    """Every bfloat16, its neighbours in float64, and what lies between two."""
    values = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    with np.errstate(all="ignore"):
        values = values.astype(np.float64)
        finite = np.sort(values[np.isfinite(values)])
        middles = (finite[1:] + finite[:-1]) / 2
        beyond = np.array([3.4e38, 3.3961775e38, 1e39, 1e308, 1e-46, 1e-320, 5e-324])
        exact = np.concatenate([values, finite, middles, beyond, -beyond])
        near = [np.nextafter(exact, np.inf), np.nextafter(exact, -np.inf)]
    return np.concatenate([exact, *near])


def nearest_bfloat16(values):
    """Rounded from first principles: the nearest, and of two the even one."""
    every = np.arange(0x7F80, dtype=np.uint16).view(ml_dtypes.bfloat16)
    # Infinity stands where the next one would.
    steps = np.append(every.astype(np.float64), 2.0**128)
    size = np.abs(values)
    upper = np.clip(np.searchsorted(steps, size), 1, len(steps) - 1)
    below, above = steps[upper - 1], steps[upper]
    # Subtraction is exact: both are within a factor of two, or tiny and even.
    down, up = size - below, above - size
    take_upper = (up < down) | ((up == down) & (upper % 2 == 0))
    bits = np.where(take_upper, upper, upper - 1).astype(np.uint16)
    bits[size >= steps[-1]] = 0x7F80
    return bits | np.where(np.signbit(values), 0x8000, 0).astype(np.uint16)


def test_float64_is_rounded_to_bfloat16_once(on_a_cpu):
    values = interesting()
    found = np.empty(values.size, np.uint16)
    convert(on_a_cpu, values, found, "float64_to_bfloat16")
    nan = np.isnan(values)
    assert np.array_equal(found[~nan], nearest_bfloat16(values[~nan]))
    assert np.isnan(found[nan].view(ml_dtypes.bfloat16).astype(np.float32)).all()


def test_float32_is_rounded_to_bfloat16_with_its_denormals(on_a_cpu):
    with np.errstate(all="ignore"):
        values = interesting().astype(np.float32)
        near = [np.nextafter(values, each) for each in np.float32([np.inf, -np.inf])]
    values = np.concatenate([values, *near])
    found = np.empty(values.size, np.uint16)
    convert(on_a_cpu, values, found, "float32_to_bfloat16")
    nan = np.isnan(values)
    exact = values[~nan].astype(np.float64)
    assert np.array_equal(found[~nan], nearest_bfloat16(exact))
    assert np.isnan(found[nan].view(ml_dtypes.bfloat16).astype(np.float32)).all()


def test_float64_sums_take_float32_shares_as_they_are(on_a_cpu):
    shares = np.float32([1e-45, 1.0, np.inf, -2.5])
    sums = np.array([1.0, 2.0**53, 3.0, 1e300])
    expected = sums + shares.astype(np.float64)
    convert(on_a_cpu, shares, sums, "float32_added_to_float64")
    assert np.array_equal(sums, expected)
    convert(on_a_cpu, shares, sums, "float32_to_float64")
    assert np.array_equal(sums, shares.astype(np.float64))


def run(library, name, *arguments):
    """Run a kernel with arrays and scalars, as a GPU's one thread."""
    kinds = {"f": ctypes.c_float, "d": ctypes.c_double, "u": ctypes.c_uint64}
    given = [
        ctypes.c_void_p(each if each is None else each.ctypes.data)
        if each is None or isinstance(each, np.ndarray)
        else kinds.get(np.dtype(type(each)).char, ctypes.c_int)(each)
        for each in arguments
    ]
    getattr(library, name)(*given)


@pytest.mark.parametrize("scale", [1.0, 0.37])
@pytest.mark.parametrize("dtype", ACCUMULATORS)
@pytest.mark.parametrize("optimizer", UPDATES)
def test_updates_have_the_bits_of_numpys(on_a_cpu, optimizer, dtype, scale):
    rng = np.random.default_rng(0)
    p = rng.standard_normal(1000).astype(dtype.numpy)
    states = {name: np.zeros_like(p) for name in optimizer.states}
    found = [p.copy(), *(state.copy() for state in states.values())]
    for made in range(4):
        # Of all sizes, and some whose squares leave the range of float32.
        g = (rng.standard_normal(1000) * 10.0 ** rng.integers(-22, 4, 1000)).astype(
            dtype.numpy
        )
        update(optimizer, p, g, states, made, scale=scale)
        if isinstance(optimizer, Sgd):
            scalars = SgdScalars.of(optimizer, dtype, scale)
            buffers = found[1:] or [None]
            flags = (int(not made), int(optimizer.nesterov))
        else:
            scalars = AdamScalars.of(optimizer, dtype, scale, made + 1)
            buffers, flags = found[1:], ()
        name = update_name(optimizer, dtype)
        size = np.uint64(p.size)
        run(on_a_cpu, name, found[0], g, *buffers, size, *scalars, *flags)
    for one, other in zip(found, [p, *states.values()], strict=True):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("dtype", ACCUMULATORS)
def test_squares_are_summed_in_float64(on_a_cpu, dtype):
    values = np.float64([1e30, -3.0, 2.0**-60, 1.0]).astype(dtype.numpy)
    found = np.full(2, -1.0)
    run(on_a_cpu, squares_name(dtype), values, found, np.uint64(values.size))
    np.testing.assert_allclose(found, [sum_of_squares(values), -1.0], rtol=1e-15)
    values[1] = np.nan
    run(on_a_cpu, squares_name(dtype), values, found, np.uint64(values.size))
    assert np.isnan(found[0])


@pytest.mark.parametrize("dtype", [Dtype.BFLOAT16, *ACCUMULATORS])
def test_added_elements_are_rounded_once(on_a_cpu, dtype):
    rng = np.random.default_rng(0)
    pairs = rng.standard_normal((2, 4000)) * 10.0 ** rng.integers(-6, 6, (2, 4000))
    source, to = pairs.astype(dtype.numpy)
    expected = to + source
    run(on_a_cpu, added_name(dtype), source, to, np.uint64(to.size))
    assert to.tobytes() == expected.tobytes()
