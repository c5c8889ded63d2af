"""Job specs for tests that need one."""

from __future__ import annotations

from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.job_spec import BufferRef, JobSpec
from gradwire_protocol.matrices import RESULTS, Matrix

ALL = RESULTS


def make_spec(
    m: int | None = None,
    n: int = 3,
    k: int = 5,
    dtype: Dtype = Dtype.FLOAT32,
    results: tuple[Matrix, ...] = ALL,
    result_dtype: Dtype | None = None,
    accumulator: Dtype | None = None,
    max_chunk_bytes: int = 1 << 20,
    places: dict[Matrix, BufferRef] | None = None,
    block_rows: int | None = None,
    segment_rows: int | None = None,
) -> JobSpec:
    return JobSpec(
        m=m,
        n=n,
        k=k,
        dtype=dtype,
        results=dict.fromkeys(results, result_dtype or dtype),
        dw_accumulator=accumulator,
        max_chunk_bytes=max_chunk_bytes,
        buffers=places or {},
        block_rows=block_rows,
        segment_rows=segment_rows,
    )
