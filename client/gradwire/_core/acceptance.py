"""Checks that the server accepted and answered the requested job."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import Message

from gradwire._api.errors import NumericsError, ProtocolError
from gradwire._core.job_plan import Plan
from gradwire._core.numerics import check_numerics
from gradwire._core.segments import accumulator_of, block_rows_of
from gradwire_protocol.data_plane.frames import TOKEN_BYTES
from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.v1.job_pb2 import Accepted, Job
from gradwire_protocol.v1.job_pb2 import Receipt as ReceiptMessage

_FILLED_IN = frozenset({"job_id", "numerics.dw_accumulator", "max_chunk_bytes"})
"""Options with a default that the server chooses."""


def check_accepted(accepted: Accepted, job: Job, plan: Plan) -> None:
    """Check that the server accepted the job as it was sent.

    Raises:
        NumericsError: The server has not what all servers of the job must have.
        ProtocolError: The server understood an option otherwise, or sent an
            impossible size.
    """
    rows, window = accepted.block_rows, accepted.window_rows
    if rows < 1 or window < 1 or accepted.credit_blocks < 0:
        raise ProtocolError(
            f"the server announced blocks of {rows} rows, a window of {window} and a"
            f" credit of {accepted.credit_blocks}"
        )
    if accepted.HasField("direct"):
        direct, offered = accepted.direct, job.direct.connections
        if not 1 <= direct.connections <= offered or len(direct.token) != TOKEN_BYTES:
            raise ProtocolError(
                f"the server takes {direct.connections} direct connections with a token"
                f" of {len(direct.token)} bytes: expected 1 to {offered}, and"
                f" {TOKEN_BYTES} bytes"
            )
    numerics = plan.options.numerics
    if numerics is not None:
        rows = block_rows_of(plan, numerics.row_block_bytes)
        check_numerics(accepted, numerics, rows)
        _check_sums(accepted, plan)
    if _with_defaults(job, accepted.effective_job) == accepted.effective_job:
        return  # The usual case, and faster than the search for a difference.
    difference = _difference(job, accepted.effective_job)
    if difference is not None:
        path, asked, understood = difference
        raise ProtocolError(
            f"the server did not understand the option {path}: expected {asked},"
            f" but the server would use {understood}"
        )


def _check_sums(accepted: Accepted, plan: Plan) -> None:
    """Check what the bits of a segment's sums depend on, beside the fingerprint.

    Raises:
        NumericsError: The server sums in another dtype than the other servers.
        ProtocolError: It contradicts itself.
    """
    if accepted.block_rows != accepted.fingerprint.block_rows:
        raise ProtocolError(
            f"the server announced blocks of {accepted.block_rows} rows, and in its"
            f" fingerprint of {accepted.fingerprint.block_rows}"
        )
    if not plan.sums and not plan.sums_of_segments:
        return
    expected = accumulator_of(plan)
    number = int(accepted.effective_job.numerics.dw_accumulator)
    if number != expected:
        names = {int(each): each.label for each in Dtype}
        raise NumericsError(
            f"the server sums in {names.get(number, f'the unknown dtype {number}')}:"
            f" expected {expected.label}, as the other servers of the job"
        )


def check_receipt(receipt: ReceiptMessage, job: Job, m: int | None) -> None:
    """Check that a receipt belongs to the job.

    Raises:
        ProtocolError: It belongs to another job.
    """
    if receipt.m != m or receipt.job_id != job.job_id:
        raise ProtocolError(
            f"the server's receipt is for {receipt.m} rows of job {receipt.job_id!r}:"
            f" expected {m} rows of job {job.job_id!r}"
        )


def _with_defaults(asked: Job, understood: Job) -> Job:
    """Return `asked`, with the accumulator of `understood` if `asked` has none."""
    filled = Job()
    filled.CopyFrom(asked)
    if not asked.numerics.dw_accumulator:
        filled.numerics.dw_accumulator = understood.numerics.dw_accumulator
    return filled


def _difference(
    asked: Message, understood: Message, path: str = ""
) -> tuple[str, Any, Any] | None:
    """Return the first option in which two headers differ, and its two values."""
    for field in asked.DESCRIPTOR.fields:
        name = path + field.name
        if field.has_presence and not (
            asked.HasField(field.name) or understood.HasField(field.name)
        ):
            continue
        one, other = getattr(asked, field.name), getattr(understood, field.name)
        if isinstance(one, Message):
            if asked.HasField(field.name) != understood.HasField(field.name):
                return name, asked.HasField(field.name), understood.HasField(field.name)
            inner = _difference(one, other, f"{name}.")
            if inner is not None:
                return inner
        elif one != other and (one or name not in _FILLED_IN):
            return name, one, other
    return None
