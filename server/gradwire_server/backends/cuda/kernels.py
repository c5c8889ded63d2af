"""CUDA kernels that convert sums to another dtype, or add them to wider sums.

They need only NVRTC, no headers. Conversions use PTX instructions and bit arithmetic,
so that compiler options do not affect them (CuPy's own kernels flush denormals to
zero). Every conversion rounds once, to nearest, ties to even. A float64 is never
rounded to float32 before 16 bits.
"""

from __future__ import annotations

from gradwire_protocol.dtypes import ACCUMULATORS, Dtype
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

"""


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


def _kernels() -> str:
    return "".join(
        f"{'ADD' if add else 'CONVERT'}({source.label}, {CUDA_TYPES[source].c_name}, "
        f"{to.label}, {CUDA_TYPES[to].c_name})\n"
        for source, to, add in _NAMES
    )


SOURCE = _FUNCTIONS + _kernels()
"""Source of all kernels. Their arguments are source, destination and size."""
