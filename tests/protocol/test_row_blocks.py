"""Sizes of row blocks and segments, against their definitions."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gradwire_protocol.row_blocks import rows_of_a_block, segment_rows

SIZES = st.one_of(st.integers(0, 5000), st.integers(0, 2**31))
ITEMSIZES = st.sampled_from((2, 4, 8))
POWERS = st.integers(0, 40).map(lambda bit: 1 << bit)


@given(SIZES, SIZES, ITEMSIZES, st.integers(1, 1 << 32), st.lists(st.none() | POWERS))
def test_a_block_has_the_largest_power_of_two_of_rows_that_fit(
    n, k, itemsize, row_block_bytes, at_most
):
    fitting = [
        rows
        for rows in (1 << bit for bit in range(14))
        if rows * max((n + k) * itemsize, 1) <= row_block_bytes
    ]
    own = max(fitting, default=1)
    assert rows_of_a_block(n, k, itemsize, row_block_bytes) == own
    limits = [own, *(limit for limit in at_most if limit is not None)]
    assert rows_of_a_block(n, k, itemsize, row_block_bytes, *at_most) == min(limits)


@given(SIZES, SIZES, ITEMSIZES, st.sampled_from((4, 8)), POWERS)
def test_a_segment_has_the_fewest_blocks_that_outweigh_its_sum(
    n, k, itemsize, accumulator_itemsize, block_rows
):
    blocks = 1
    while blocks * block_rows * (n + k) * itemsize < 16 * n * k * accumulator_itemsize:
        blocks *= 2
    found = segment_rows(n, k, itemsize, accumulator_itemsize, block_rows)
    assert found == blocks * block_rows


def test_up_to_512_columns_a_segment_of_float32_is_one_block():
    for columns, blocks in ((1, 1), (512, 1), (513, 4), (1024, 4)):
        rows = rows_of_a_block(columns, columns, 4, 32 << 20)
        assert segment_rows(columns, columns, 4, 8, rows) == blocks * rows
