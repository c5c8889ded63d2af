"""What of a stream is taken, and where it belongs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.framing import Chunk
from gradwire_protocol.matrices import Matrix
from gradwire_server.backends.row_blocks import plan_row_blocks
from gradwire_server.errors import JobError
from gradwire_server.jobs.stream.request_validator import RequestValidator
from tests.server.specs import ALL, make_spec


def make_validator(m=None, n=3, k=5, results=ALL, block_rows=4):
    spec = make_spec(m, n, k, results=results)
    plan = plan_row_blocks(spec, block_rows * (n + k) * 4, 1)
    assert plan.block_rows == block_rows
    return RequestValidator(spec, plan), spec, plan


def accept(validator, message):
    """The message's pieces, each placed."""
    for piece in validator.accept(message):
        validator.commit(piece)
        yield piece


def chunk(matrix, index, elements):
    return Chunk(matrix, index, memoryview(bytes(4 * elements)))


def reason_of(call, *args):
    with pytest.raises(JobError) as caught:
        list(call(*args))
    return caught.value.reason


@settings(max_examples=100)
@given(st.data())
def test_every_split_puts_every_byte_where_it_belongs(data):
    m = data.draw(st.integers(0, 30))
    validator, spec, plan = make_validator(m if data.draw(st.booleans()) else None)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    operands = {
        Matrix.W: rng.bytes(3 * 5 * 4),
        Matrix.X: rng.bytes(m * 3 * 4),
        Matrix.DY: rng.bytes(m * 5 * 4),
    }
    commit = {matrix: bytearray(len(full)) for matrix, full in operands.items()}

    def send(matrix, count):
        index = sent[matrix]
        payload = memoryview(operands[matrix])[4 * index : 4 * (index + count)]
        for piece in accept(validator, Chunk(matrix, index, payload)):
            area = 0
            if matrix is not Matrix.W:
                area = piece.span.block * plan.block_rows * spec.row_length(matrix) * 4
            first = area + piece.span.offset
            commit[matrix][first : first + piece.payload.nbytes] = piece.payload
        sent[matrix] += count

    sent = dict.fromkeys(operands, 0)
    while sent[Matrix.W] < 15:
        send(Matrix.W, data.draw(st.integers(1, 15 - sent[Matrix.W])))
    while True:
        open_ = [
            each
            for each in (Matrix.X, Matrix.DY)
            if sent[each] < m * spec.row_length(each)
        ]
        if not open_:
            break
        least = min(open_, key=lambda each: sent[each] // spec.row_length(each))
        left = m * spec.row_length(least) - sent[least]
        send(least, data.draw(st.integers(1, min(left, 7 * spec.row_length(least)))))
    validator.end(m)
    assert {matrix: bytes(area) for matrix, area in commit.items()} == operands
    assert validator.blocks_complete == -(-m // plan.block_rows)
    assert sum(map(validator.rows_of, range(validator.blocks_complete))) == m


@settings(max_examples=100)
@given(st.data())
def test_what_the_window_allows_always_finds_a_slot(data):
    """Otherwise the server would wait for a slot that never becomes free."""
    validator, spec, plan = make_validator()
    list(accept(validator, chunk(Matrix.W, 0, 15)))
    sent = {Matrix.X: 0, Matrix.DY: 0}
    for _ in range(20):
        matrix = data.draw(st.sampled_from((Matrix.X, Matrix.DY)))
        count = data.draw(st.integers(1, 20 * spec.row_length(matrix)))
        complete = validator.blocks_complete
        try:
            pieces = list(accept(validator, chunk(matrix, sent[matrix], count)))
        except JobError:
            continue
        sent[matrix] += count
        # Complete blocks leave by themselves; the message may have to wait for
        # those that were complete before it, or that it completes itself.
        for piece in pieces:
            other = Matrix.DY if matrix is Matrix.X else Matrix.X
            oldest = sent[other] // spec.row_length(other) // plan.block_rows
            assert piece.span.block < max(oldest, complete) + plan.slots


def test_the_leading_operand_may_fill_the_window_and_not_one_element_more():
    validator, _, plan = make_validator()
    list(accept(validator, chunk(Matrix.W, 0, 15)))
    window = plan.window_rows
    list(accept(validator, chunk(Matrix.X, 0, 3 * window)))
    refused = reason_of(accept, validator, chunk(Matrix.X, 3 * window, 1))
    assert refused is Reason.LEAD_EXCEEDED
    list(accept(validator, chunk(Matrix.DY, 0, 5)))
    list(accept(validator, chunk(Matrix.X, 3 * window, 3)))


def test_a_single_row_operand_has_no_window():
    validator, _, plan = make_validator(results=(Matrix.Y,))
    list(accept(validator, chunk(Matrix.W, 0, 15)))
    list(accept(validator, chunk(Matrix.X, 0, 3 * 10 * plan.window_rows)))
    assert validator.blocks_complete == 10 * plan.window_rows // plan.block_rows


def test_rows_without_elements_are_complete_only_at_the_end():
    validator, _, _ = make_validator(n=0, results=(Matrix.Y,))
    assert validator.blocks_complete == 0
    validator.end(9)
    assert validator.blocks_complete == 3
    assert [validator.rows_of(each) for each in range(3)] == [4, 4, 1]


def test_a_block_is_complete_only_when_all_of_its_own_pieces_were_given_out():
    validator, _, _ = make_validator()
    list(accept(validator, chunk(Matrix.W, 0, 15)))
    list(accept(validator, chunk(Matrix.X, 0, 8 * 3)))  # two row blocks of X
    complete = [
        validator.blocks_complete for _ in accept(validator, chunk(Matrix.DY, 0, 8 * 5))
    ]
    assert complete == [1, 2]
