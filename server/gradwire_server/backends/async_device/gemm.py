"""Products in cuBLAS's letters, as data.

cuBLAS reads matrices column by column. A row-major matrix of r rows and c
columns, read so, is its transpose: c rows, r columns, and a leading dimension
of c. So for row-major operands a product is asked for as its transpose, with
the operands in the other order, and nothing is ever copied or turned:

    Y  = X W     Yᵀ  = Wᵀ Xᵀ     stored W is Wᵀ (k, n) and X is Xᵀ (n, rows)
    dX = dY Wᵀ   dXᵀ = W dYᵀ     stored W has to be turned, dY is dYᵀ (k, rows)
    dW = Xᵀ dY   dWᵀ = dYᵀ X     stored dY is dYᵀ (k, rows), X has to be turned
    dB = 1ᵀ dY   dBᵀ = dYᵀ 1     likewise, with a column of ones for X

which in the letters of a gemm, C (m, n) = alpha op(A) op(B) + beta C with
op(A) (m, k) and op(B) (k, n), is

    product   op(A)  op(B)  m  n     k     A   lda  B   ldb  C   ldc
    Y         N      N      k  rows  n     W   k    X   n    Y   k
    dX        T      N      n  rows  k     W   k    dY  k    dX  n
    dW        N      T      k  n     rows  dY  k    X   n    dW  k
    dB        N      T      k  1     rows  dY  k    1   1    dB  k

Nothing here needs a GPU: any BLAS that takes these letters will do.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

from gradwire_protocol.dtypes import Dtype

DISALLOW_REDUCED_PRECISION_REDUCTION = 16
"""`cublasMath_t`: parts of a sum are added in the compute type, never in the
narrower type of the result."""

POINTER_MODE_HOST = 0
"""`cublasPointerMode_t`: alpha and beta are in host memory."""

DEFAULT_ALGORITHM = -1
"""`cublasGemmAlgo_t`: cuBLAS chooses."""

NO_TRANSPOSE, TRANSPOSE = 0, 1
"""`cublasOperation_t`."""

MAX_SIZE = 2**31 - 1
"""Largest m, n, k and leading dimension: cuBLAS's are 32 bits."""


class CudaType(NamedTuple):
    """What CUDA knows of an element type."""

    number: int
    """`cudaDataType_t`."""

    c_name: str
    """The type of an element in the source of the kernels."""

    truncated: bool = False
    """Whether tensor cores take such operands, which truncate sums of them."""


CUDA_TYPES = {
    Dtype.FLOAT16: CudaType(2, "u16", truncated=True),
    Dtype.BFLOAT16: CudaType(14, "u16", truncated=True),
    Dtype.FLOAT32: CudaType(0, "float"),
    Dtype.FLOAT64: CudaType(1, "double"),
}
"""All that this backend knows of each element type, beside how the kernels
round to it (`to_float16` and so on there)."""

SUMS_ROUNDED_TO_NEAREST = tuple(
    dtype for dtype, cuda in CUDA_TYPES.items() if not cuda.truncated
)
"""Element types of operands whose products are summed with every addition
rounded to nearest."""


class Compute(enum.IntEnum):
    """In what products are computed and summed: `cublasComputeType_t`.

    Beside TF32 each has the name of the dtype of the sums.
    """

    FLOAT32 = 68
    TF32 = 77
    """float32 operands are rounded to 10 bits of fraction first."""
    FLOAT64 = 70

    @property
    def scalars(self) -> Dtype:
        """The element type of alpha and beta."""
        return Dtype.FLOAT32 if self is Compute.TF32 else Dtype[self.name]

    @classmethod
    def of(cls, operands: Dtype, *, allow_tf32: bool) -> Compute:
        """How products of such operands are computed."""
        if operands.has_tf32 and allow_tf32:
            return cls.TF32
        return cls[operands.sums_in.name]


@dataclass(frozen=True, slots=True)
class DeviceMatrix:
    """A row-major matrix without gaps in a device's memory."""

    address: int
    rows: int
    columns: int
    dtype: Dtype

    @property
    def size(self) -> int:
        """Elements."""
        return self.rows * self.columns


@dataclass(frozen=True, slots=True)
class Gemm:
    """C (m, n) = alpha op(A) op(B) + beta C, columns first, as cuBLAS has it.

    With beta = 0, C is not read.
    """

    transa: bool
    transb: bool
    m: int
    n: int
    k: int
    a: int
    """Address of A, and the others' likewise."""
    lda: int
    b: int
    ldb: int
    c: int
    ldc: int
    operands: Dtype
    """Element type of A and B."""
    result: Dtype
    """Element type of C."""
    compute: Compute
    alpha: float = 1.0
    beta: float = 0.0


def computes_into(operands: Dtype, result: Dtype) -> bool:
    """Whether a gemm of such operands can write such a result by itself.

    It computes in `operands.sums_in` and rounds once; cuBLAS has no other
    pairs. Elsewhere the result passes through scratch in that type.
    """
    return result in {operands, operands.sums_in}


def multiply(
    a: DeviceMatrix, b: DeviceMatrix, out: DeviceMatrix, compute: Compute
) -> Gemm:
    """Out = a b, as Y = X W."""
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
    """Out = a bᵀ, as dX = dY Wᵀ."""
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


def accumulate_transposed(
    a: DeviceMatrix,
    b: DeviceMatrix,
    out: DeviceMatrix,
    compute: Compute,
    *,
    first: bool,
) -> Gemm:
    """Out += aᵀ b, as dW += Xᵀ dY; with `first`, out = aᵀ b."""
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
        beta=0.0 if first else 1.0,
    )
