"""How jobs are cut, and where their bytes lie."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.job_spec import Fingerprint, Resume
from gradwire_protocol.matrices import Matrix
from gradwire_protocol.row_blocks import MAX_BLOCK_ROWS
from gradwire_server.backends.row_blocks import (
    ALIGNMENT,
    held_in,
    plan_row_blocks,
)
from tests.server.specs import ALL, make_spec

SOME_RESULTS = [subset for size in (1, 2, 3) for subset in combinations(ALL, size)]
sizes = st.integers(0, 5000)


@given(sizes, sizes, st.sampled_from(Dtype), st.integers(1, 1 << 24))
def test_rows_of_a_block_depend_on_nothing_but_shape_dtype_and_configuration(
    n, k, dtype, row_block_bytes
):
    rows = {
        plan_row_blocks(spec, row_block_bytes, begun).block_rows
        for m in (None, 0, 1, 10**9)
        for results in SOME_RESULTS
        for spec in (make_spec(m, n, k, dtype, results),)
        for begun in (1, 3)
    }
    assert len(rows) == 1
    (block_rows,) = rows
    row_bytes = max((n + k) * dtype.itemsize, 1)
    assert block_rows & (block_rows - 1) == 0
    assert 1 <= block_rows <= MAX_BLOCK_ROWS
    assert block_rows == 1 or block_rows * row_bytes <= row_block_bytes
    assert block_rows == MAX_BLOCK_ROWS or 2 * block_rows * row_bytes > row_block_bytes


@given(sizes, sizes, st.sampled_from(Dtype), st.integers(0, 40))
def test_a_job_can_have_smaller_blocks_never_larger_ones(n, k, dtype, bit):
    own = plan_row_blocks(make_spec(None, n, k, dtype), 1 << 20, 1).block_rows
    for m in (None, 1, 10**9):
        asked = make_spec(m, n, k, dtype, block_rows=1 << bit)
        assert plan_row_blocks(asked, 1 << 20, 1).block_rows == min(own, 1 << bit)
        asked = make_spec(m, n, k, dtype, segment_rows=1 << bit)
        assert plan_row_blocks(asked, 1 << 20, 1).block_rows == min(own, 1 << bit)


@given(
    st.one_of(st.none(), sizes),
    sizes,
    st.one_of(sizes, st.just(1 << 16)),
    st.sampled_from(Dtype),
    st.sampled_from(SOME_RESULTS),
    st.integers(0, 20),
)
def test_small_blocks_take_at_most_a_quarter_more_operands(
    m, n, k, dtype, results, bit
):
    row_block_bytes = 1 << 20
    spec = make_spec(m, n, k, dtype, results, block_rows=1 << bit)
    plan = plan_row_blocks(spec, row_block_bytes, 1)
    # As if both operands had arrived: of a job that sends one, the results are as long.
    more = plan.extra_slots * plan.block_rows * (n + k) * dtype.itemsize
    assert more <= row_block_bytes // 4


@given(
    st.one_of(st.none(), sizes),
    sizes,
    sizes,
    st.sampled_from(Dtype),
    st.sampled_from(SOME_RESULTS),
    st.sampled_from(Dtype),
    st.sampled_from((1, 3)),
)
def test_matrices_lie_aligned_and_apart(m, n, k, dtype, results, result_dtype, begun):
    spec = make_spec(m, n, k, dtype, results, result_dtype)
    plan = plan_row_blocks(spec, 1 << 20, begun)
    ends = []
    for matrix, offset in plan.offsets.items():
        assert offset % ALIGNMENT == 0
        rows = n if matrix is Matrix.W else plan.slot_rows
        size = rows * spec.row_length(matrix) * spec.dtype_of(matrix).itemsize
        limit = plan.w_bytes if matrix is Matrix.W else plan.slot_bytes
        assert offset + size <= limit
        if matrix is not Matrix.W:
            ends.append((offset, offset + size))
    assert all(end <= start for (_, end), (start, _) in pairwise(sorted(ends)))
    assert plan.w_bytes % ALIGNMENT == plan.slot_bytes % ALIGNMENT == 0
    assert plan.region_bytes == plan.w_bytes + plan.slots * plan.slot_bytes


@pytest.mark.parametrize(
    ("m", "slots"), [(None, 6), (10**9, 6), (129, 4), (128, 3), (1, 3), (0, 3)]
)
def test_a_job_holds_what_its_device_has_begun_and_one_block_at_each_end(m, slots):
    plan = plan_row_blocks(make_spec(m, 64, 64), 1 << 16, 4)
    assert plan.block_rows == 128
    assert plan.slots == slots


def test_memory_does_not_grow_with_the_rows():
    plans = [
        plan_row_blocks(make_spec(m, 64, 64), 1 << 20, 1) for m in (10**5, 10**12, None)
    ]
    assert len({plan.region_bytes for plan in plans}) == 1


@pytest.mark.parametrize(
    ("m", "segment_rows", "segments"),
    [
        *((None, 64, True), (65, 64, True), (64, 64, False), (0, 64, False)),
        *((None, 16, False), (65, 8, False), (65, None, False)),
    ],
)
def test_only_several_segments_of_several_blocks_take_memory_for_their_total(
    m, segment_rows, segments
):
    spec = make_spec(m, 30, 20, block_rows=16, segment_rows=segment_rows)
    plan = plan_row_blocks(spec, 1 << 20, 1)
    plain = plan_row_blocks(replace(spec, segment_rows=None), 1 << 20, 1)
    sums_bytes = sum(spec.size_bytes(result.partial) for result in spec.sums)
    assert plan.total_bytes == (2 * sums_bytes if segments else 0)
    assert plan.segment_rows == (segment_rows or 16)
    if plan.block_rows == 16:
        assert plan.region_bytes == plain.region_bytes
    # A client that adds them itself is sent them from the region.
    by_segment = replace(spec, segment_rows=64, segment_sums=True)
    plan = plan_row_blocks(by_segment, 1 << 20, 1)
    assert plan.total_bytes == 0
    assert 0 <= plan.region_bytes - plain.region_bytes - sums_bytes < 2 * ALIGNMENT


@pytest.mark.parametrize("m", [0, 1, 7])
def test_a_job_of_few_rows_takes_the_memory_of_few_rows(m):
    assert plan_row_blocks(make_spec(m, 64, 64), 1 << 24, 1).slot_rows == m


def test_only_what_is_one_block_for_certain_is_held_as_its_product():
    wide, product = Dtype.FLOAT64, Dtype.FLOAT32
    spec = make_spec(16, dtype=product)
    assert held_in(spec, 16) is product
    assert held_in(replace(spec, checkpoint_rows=0), 16) is product
    assert held_in(replace(spec, m=17), 16) is wide
    assert held_in(replace(spec, m=None), 16) is wide
    # Partial sums leave, or arrive, as the accumulator holds them.
    assert held_in(replace(spec, checkpoint_rows=16), 16) is wide
    there = Resume(16, 16, Fingerprint("", "", 1, 16, 16))
    assert held_in(replace(spec, resume=there), 16) is wide
    results = spec.results | {Matrix.DW: wide}
    assert held_in(replace(spec, results=results), 16) is wide
    narrow = replace(spec, m=None, dw_accumulator=product)
    assert held_in(narrow, 16) is product
