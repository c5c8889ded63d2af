"""CUDA kernels: conversions, additions, sums of squares, and updates of weights.

They need only NVRTC, no headers. They use PTX instructions and bit arithmetic, so that
compiler options do not affect them (CuPy's own kernels flush denormals to zero, and
compilers fuse a product and the sum that follows it). Every operation rounds once, to
nearest, ties to even. A float64 is never rounded to float32 before 16 bits. So updates
have the bits of `backends.numpy.updates`.
"""

from __future__ import annotations

from collections.abc import Iterator

from gradwire_protocol.dtypes import ACCUMULATORS, Dtype
from gradwire_protocol.optimizers import Optimizer
from gradwire_server.backends.async_device.gemm import CUDA_TYPES

THREADS = 256
"""Threads in a block of the grid."""

_MOST_BLOCKS = 1 << 16
"""Most blocks in the grid. Each thread converts several elements if there are more."""

_FUNCTIONS = r"""
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

__device__ __forceinline__ double to_float64(float value) {
    double wide;
    asm("cvt.f64.f32 %0, %1;" : "=d"(wide) : "f"(value));
    return wide;
}

__device__ __forceinline__ float to_float32(double value) {
    float narrow;
    asm("cvt.rn.f32.f64 %0, %1;" : "=f"(narrow) : "d"(value));
    return narrow;
}

__device__ __forceinline__ u16 to_float16(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ __forceinline__ u16 to_float16(double value) {
    u16 bits;
    asm("cvt.rn.f16.f64 %0, %1;" : "=h"(bits) : "d"(value));
    return bits;
}

/* The upper half of a float32 is a bfloat16. */
__device__ __forceinline__ u16 upper_half(u32 bits) {
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return (u16)((bits >> 16) | 0x0040u); /* NaN, and stays one */
    return (u16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

__device__ __forceinline__ u16 to_bfloat16(float value) {
    return upper_half(__float_as_uint(value));
}

/* Cut to float32 with the last bit set if anything was cut off, it has enough
   bits left to be rounded as if it never had been cut. */
__device__ __forceinline__ u16 to_bfloat16(double value) {
    float cut;
    asm("cvt.rz.f32.f64 %0, %1;" : "=f"(cut) : "d"(value));
    u32 bits = __float_as_uint(cut);
    if (value == value && to_float64(cut) != value)
        bits |= 1u;
    return upper_half(bits);
}

__device__ __forceinline__ double to_float64(double value) { return value; }

__device__ __forceinline__ float from_float16(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ float from_bfloat16(u16 bits) {
    return __uint_as_float((u32)bits << 16);
}

__device__ __forceinline__ float from_float32(float value) { return value; }
__device__ __forceinline__ double from_float64(double value) { return value; }
__device__ __forceinline__ float to_float32(float value) { return value; }

#define FOR_EACH(index, size) \
    for (u64 index = blockIdx.x * (u64)blockDim.x + threadIdx.x; index < size; \
         index += gridDim.x * (u64)blockDim.x)

#define CONVERT(from, source_type, to, target_type) \
    extern "C" __global__ void from##_to_##to( \
        const source_type *source, target_type *target, u64 size) { \
        FOR_EACH(index, size) target[index] = to_##to(source[index]); \
    }

#define ADD(from, source_type, to, target_type) \
    extern "C" __global__ void from##_added_to_##to( \
        const source_type *source, target_type *target, u64 size) { \
        FOR_EACH(index, size) target[index] += to_##to(source[index]); \
    }

/* 24 bits are enough that a 16-bit sum is as if it were rounded once. */
#define ADD_ALIKE(label, type) \
    extern "C" __global__ void label##_added( \
        const type *source, type *target, u64 size) { \
        FOR_EACH(index, size) target[index] = to_##label( \
            add(from_##label(target[index]), from_##label(source[index]))); \
    }

/* Which elements a block sums, and their order, depend on the size of the grid. */
#define SUM_SQUARES(label, type) \
    extern "C" __global__ void label##_squares( \
        const type *source, double *sums, u64 size) { \
        __shared__ double shares[THREADS]; \
        double sum = 0.0; \
        FOR_EACH(index, size) { \
            double value = to_float64(source[index]); \
            sum = add(sum, multiply(value, value)); \
        } \
        shares[threadIdx.x] = sum; \
        __syncthreads(); \
        for (u32 half = blockDim.x / 2; half; half /= 2) { \
            if (threadIdx.x < half) \
                shares[threadIdx.x] = \
                    add(shares[threadIdx.x], shares[threadIdx.x + half]); \
            __syncthreads(); \
        } \
        if (!threadIdx.x) sums[blockIdx.x] = shares[0]; \
    }

#define SCALE_AND_DECAY(type) \
    __device__ __forceinline__ type scaled_and_decayed( \
        type p, type g, type scale, type weight_decay) { \
        if (scale != (type)1) g = multiply(g, scale); \
        if (weight_decay != (type)0) g = add(g, multiply(p, weight_decay)); \
        return g; \
    }

#define SGD(label, type) \
    extern "C" __global__ void label##_sgd( \
        type *p, const type *g, type *buffers, u64 size, type scale, \
        type weight_decay, type lr, type momentum, type undamped, int first, \
        int nesterov) { \
        FOR_EACH(index, size) { \
            type step = scaled_and_decayed(p[index], g[index], scale, weight_decay); \
            if (buffers) { \
                type b = step; \
                if (!first) \
                    b = add(multiply(buffers[index], momentum), \
                            multiply(step, undamped)); \
                buffers[index] = b; \
                step = nesterov ? add(step, multiply(b, momentum)) : b; \
            } \
            p[index] = subtract(p[index], multiply(step, lr)); \
        } \
    }

#define ADAM(label, type) \
    extern "C" __global__ void label##_adam( \
        type *p, const type *g, type *averages, type *squares, u64 size, type scale, \
        type weight_decay, type kept, type fresh, type decay2, type fresh2, \
        type step_size, type correction2, type eps) { \
        FOR_EACH(index, size) { \
            type weight = p[index], m = averages[index], v = squares[index]; \
            if (kept != (type)1) weight = multiply(weight, kept); \
            type grad = scaled_and_decayed(weight, g[index], scale, weight_decay); \
            type change = subtract(grad, m); \
            if (fresh < (type)0.5) \
                m = add(m, multiply(change, fresh)); \
            else \
                m = subtract(grad, multiply(change, subtract((type)1, fresh))); \
            v = add(multiply(v, decay2), multiply(multiply(grad, fresh2), grad)); \
            type root = add(divide(square_root(v), correction2), eps); \
            averages[index] = m; \
            squares[index] = v; \
            p[index] = subtract(weight, divide(multiply(m, step_size), root)); \
        } \
    }

"""

_ARITHMETIC = {"add": "add", "subtract": "sub", "multiply": "mul", "divide": "div"}
"""PTX instructions of the functions with two operands."""


def added_name(dtype: Dtype) -> str:
    """Return the name of the kernel that adds elements to others of their dtype."""
    return f"{dtype.label}_added"


def squares_name(dtype: Dtype) -> str:
    """Return the name of the kernel that sums squares, with a sum for each block.

    Blocks have `THREADS` threads.
    """
    return f"{dtype.label}_squares"


def update_name(optimizer: Optimizer, dtype: Dtype) -> str:
    """Return the name of the kernel that updates weights."""
    return f"{dtype.label}_{optimizer.kind}"


def kernel_name(source: Dtype, to: Dtype, *, add: bool) -> str:
    """Return the name of the kernel that converts `source` to `to`, or adds it there.

    Raises:
        KeyError: There is no such kernel.
    """
    return _NAMES[source, to, add]


def grid(size: int) -> int:
    """Return the number of blocks in the grid for `size` elements, at least 1."""
    return min(-(-size // THREADS), _MOST_BLOCKS)


_NAMES = {
    (source, to, False): f"{source.label}_to_{to.label}"
    for source in ACCUMULATORS
    for to in Dtype
    if source is not to
} | {
    (source, to, True): f"{source.label}_added_to_{to.label}"
    for source in ACCUMULATORS
    for to in ACCUMULATORS
    if source.itemsize < to.itemsize
}


def _arithmetic() -> Iterator[str]:
    """Yield functions that round once and are not fused with others."""
    for dtype, letter in ((Dtype.FLOAT32, "f"), (Dtype.FLOAT64, "d")):
        type_, suffix = CUDA_TYPES[dtype].c_name, f"rn.f{8 * dtype.itemsize}"
        head = f"__device__ __forceinline__ {type_}"
        for name, instruction in _ARITHMETIC.items():
            yield (
                f"{head} {name}({type_} a, {type_} b) {{\n    {type_} out;\n"
                f'    asm("{instruction}.{suffix} %0, %1, %2;" '
                f': "={letter}"(out) : "{letter}"(a), "{letter}"(b));\n'
                f"    return out;\n}}\n\n"
            )
        yield (
            f"{head} square_root({type_} a) {{\n    {type_} out;\n"
            f'    asm("sqrt.{suffix} %0, %1;" : "={letter}"(out) : "{letter}"(a));\n'
            f"    return out;\n}}\n\n"
        )


def _session_kernels() -> Iterator[str]:
    for dtype in ACCUMULATORS:
        type_ = CUDA_TYPES[dtype].c_name
        yield f"SCALE_AND_DECAY({type_})\n"
        for macro in ("SUM_SQUARES", "SGD", "ADAM"):
            yield f"{macro}({dtype.label}, {type_})\n"


def _job_kernels() -> Iterator[str]:
    for dtype in Dtype:
        yield f"ADD_ALIKE({dtype.label}, {CUDA_TYPES[dtype].c_name})\n"
    for source, to, add in _NAMES:
        yield (
            f"{'ADD' if add else 'CONVERT'}({source.label}, "
            f"{CUDA_TYPES[source].c_name}, {to.label}, {CUDA_TYPES[to].c_name})\n"
        )


FUNCTIONS = "".join([f"#define THREADS {THREADS}\n", *_arithmetic(), _FUNCTIONS])
"""What the kernels use."""

JOB_KERNELS = "".join(_job_kernels())
"""The kernels of jobs, of which sessions use some. Their arguments are source,
destination and size."""

SESSION_KERNELS = "".join(_session_kernels())
"""The kernels of sessions alone, which take longer to compile.

Sums have the arguments source, destination and size. Updates have the
arrays, the size, and the factors of `update_scalars`; SGD then whether there is no
buffer yet, and `nesterov`."""


def source_of(name: str) -> str:
    """Return the source to compile for a kernel."""
    of_jobs = {*_NAMES.values(), *map(added_name, Dtype)}
    return FUNCTIONS + (JOB_KERNELS if name in of_jobs else SESSION_KERNELS)
