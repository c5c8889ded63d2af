"""The arguments of cuBLAS's gemm for the three products.

cuBLAS reads matrices in column-major order. So it reads a row-major matrix of r rows
and c columns as its transpose: c rows, r columns, and a leading dimension of c. A
product of row-major operands is therefore computed as its transpose, with the operands
swapped. Nothing is copied or transposed in memory:

    Y  = X W     Yᵀ  = Wᵀ Xᵀ     stored W is Wᵀ (k, n) and X is Xᵀ (n, rows)
    dX = dY Wᵀ   dXᵀ = W dYᵀ     stored W is transposed, dY is dYᵀ (k, rows)
    dW = Xᵀ dY   dWᵀ = dYᵀ X     stored dY is dYᵀ (k, rows), X is transposed
    dB = 1ᵀ dY   dBᵀ = dYᵀ 1     likewise, with a column of ones for X

With C (m, n) = alpha op(A) op(B) + beta C, op(A) (m, k) and op(B) (k, n), the arguments
of gemm are:

    product   op(A)  op(B)  m  n     k     A   lda  B   ldb  C   ldc
    Y         N      N      k  rows  n     W   k    X   n    Y   k
    dX        T      N      n  rows  k     W   k    dY  k    dX  n
    dW        N      T      k  n     rows  dY  k    X   n    dW  k
    dB        N      T      k  1     rows  dY  k    1   1    dB  k

This module needs no GPU: the arguments are valid for any BLAS.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

from gradwire_protocol.dtypes import Dtype

DISALLOW_REDUCED_PRECISION_REDUCTION = 16
"""`cublasMath_t`: partial sums are added in the compute type, never in the narrower
type of the result."""

POINTER_MODE_HOST = 0
"""`cublasPointerMode_t`: alpha and beta are in host memory."""

DEFAULT_ALGORITHM = -1
"""`cublasGemmAlgo_t`: cuBLAS chooses."""

NO_TRANSPOSE, TRANSPOSE = 0, 1
"""`cublasOperation_t`."""

MAX_SIZE = 2**31 - 1
"""Largest m, n, k and leading dimension: 32 bits in cuBLAS."""


class CudaType(NamedTuple):
    """CUDA's properties of a dtype."""

    number: int
    """`cudaDataType_t`."""

    c_name: str
    """Type of an element in the kernels' source code."""

    truncated: bool = False
    """Whether products use tensor cores, which truncate sums."""


CUDA_TYPES = {
    Dtype.FLOAT16: CudaType(2, "u16", truncated=True),
    Dtype.BFLOAT16: CudaType(14, "u16", truncated=True),
    Dtype.FLOAT32: CudaType(0, "float"),
    Dtype.FLOAT64: CudaType(1, "double"),
}
"""CUDA's properties of each dtype. The kernels' rounding (`to_float16` and so on) is in
`kernels`."""

SUMS_ROUNDED_TO_NEAREST = tuple(
    dtype for dtype, cuda in CUDA_TYPES.items() if not cuda.truncated
)
"""Dtypes of operands for which every addition is rounded to nearest."""


class Compute(enum.IntEnum):
    """Type in which products are computed and summed: `cublasComputeType_t`.

    Except TF32, members have the name of the dtype of the sums.
    """

    FLOAT32 = 68
    TF32 = 77
    """float32 operands are first rounded to 10 bits of fraction."""
    FLOAT64 = 70

    @property
    def scalars(self) -> Dtype:
        """Dtype of alpha and beta."""
        return Dtype.FLOAT32 if self is Compute.TF32 else Dtype[self.name]

    @classmethod
    def of(cls, operands: Dtype, *, allow_tf32: bool) -> Compute:
        """Return the compute type for products of operands."""
        if operands.has_tf32 and allow_tf32:
            return cls.TF32
        return cls[operands.sums_in.name]


@dataclass(frozen=True, slots=True)
class DeviceMatrix:
    """A contiguous row-major matrix in a device's memory."""

    address: int
    rows: int
    columns: int
    dtype: Dtype

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.rows * self.columns


@dataclass(frozen=True, slots=True)
class Gemm:
    """C (m, n) = alpha op(A) op(B) + beta C, in cuBLAS's column-major order.

    With beta = 0, C is not read.
    """

    transa: bool
    transb: bool
    m: int
    n: int
    k: int
    a: int
    """Address of A. b and c are the addresses of B and C."""
    lda: int
    b: int
    ldb: int
    c: int
    ldc: int
    operands: Dtype
    """Dtype of A and B."""
    result: Dtype
    """Dtype of C."""
    compute: Compute
    alpha: float = 1.0
    beta: float = 0.0


def computes_into(operands: Dtype, result: Dtype) -> bool:
    """Return whether a gemm can write the result's dtype directly.

    It computes in `operands.sums_in` and rounds once. cuBLAS supports no other pairs of
    dtypes. Other results are computed in scratch memory in that dtype first.
    """
    return result in {operands, operands.sums_in}


def multiply(
    a: DeviceMatrix, b: DeviceMatrix, out: DeviceMatrix, compute: Compute
) -> Gemm:
    """Return the arguments for out = a b, as in Y = X W."""
    return Gemm(
        transa=False,
        transb=False,
        m=b.columns,
        n=a.rows,
        k=a.columns,
        a=b.address,
        lda=b.columns,
        b=a.address,
        ldb=a.columns,
        c=out.address,
        ldc=out.columns,
        operands=a.dtype,
        result=out.dtype,
        compute=compute,
    )


def multiply_transposed(
    a: DeviceMatrix, b: DeviceMatrix, out: DeviceMatrix, compute: Compute
) -> Gemm:
    """Return the arguments for out = a bᵀ, as in dX = dY Wᵀ."""
    return Gemm(
        transa=True,
        transb=False,
        m=b.rows,
        n=a.rows,
        k=a.columns,
        a=b.address,
        lda=b.columns,
        b=a.address,
        ldb=a.columns,
        c=out.address,
        ldc=out.columns,
        operands=a.dtype,
        result=out.dtype,
        compute=compute,
    )


def transposed_multiply(
    a: DeviceMatrix, b: DeviceMatrix, out: DeviceMatrix, compute: Compute
) -> Gemm:
    """Return the arguments for out = aᵀ b."""
    return Gemm(
        transa=False,
        transb=True,
        m=b.columns,
        n=a.columns,
        k=a.rows,
        a=b.address,
        lda=b.columns,
        b=a.address,
        ldb=a.columns,
        c=out.address,
        ldc=out.columns,
        operands=a.dtype,
        result=out.dtype,
        compute=compute,
    )
