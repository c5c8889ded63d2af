"""Every row block belongs to one connection, and every element keeps its place."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gradwire.wire.shares import Share


@given(
    m=st.integers(0, 200),
    connections=st.integers(1, 16),
    block_rows=st.integers(1, 9),
    row_length=st.integers(1, 4),
)
def test_the_shares_of_all_connections_are_the_whole_matrix(
    m: int, connections: int, block_rows: int, row_length: int
) -> None:
    indices = []
    for connection in range(connections):
        share = Share(connection, connections, block_rows)
        own = [
            share.index(count, row_length)
            for count in range(share.rows(m) * row_length)
        ]
        assert own == sorted(own)
        blocks = {index // (block_rows * row_length) for index in own}
        assert {block % connections for block in blocks} <= {connection}
        indices += own
    assert sorted(indices) == list(range(m * row_length))


def test_with_one_connection_nothing_is_shared_out() -> None:
    share = Share(0, 1, 4)
    assert [share.rows(m) for m in (0, 1, 9)] == [0, 1, 9]
    assert share.index(37, 5) == 37
    assert share.room(37, 5) is None


def test_a_message_ends_where_its_row_block_ends() -> None:
    share = Share(1, 3, 4)
    assert [share.room(count, 5) for count in (0, 7, 19, 20)] == [20, 13, 1, 20]


def test_rows_without_elements_begin_and_end_at_once() -> None:
    share = Share(1, 3, 4)
    assert share.index(0, 0) == 0
    assert share.room(0, 0) == 0
