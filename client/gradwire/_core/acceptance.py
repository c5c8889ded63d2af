"""Whether the server took on what it was asked, and answers that."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import Message

from gradwire._api.errors import ProtocolError
from gradwire_protocol.v1.job_pb2 import Accepted, Job
from gradwire_protocol.v1.job_pb2 import Receipt as ReceiptMessage

_FILLED_IN = frozenset({"job_id", "numerics.dw_accumulator", "max_chunk_bytes"})
"""Options that a server chooses where a job leaves them out."""


def check_accepted(accepted: Accepted, job: Job) -> None:
    """Check that the server took on what it was asked.

    Raises:
        ProtocolError: An option was not understood, or a size cannot be.
    """
    if accepted.block_rows < 1 or accepted.window_rows < 1:
        raise ProtocolError(
            f"the server announced blocks of {accepted.block_rows} rows and a window"
            f" of {accepted.window_rows}"
        )
    if _with_defaults(job, accepted.effective_job) == accepted.effective_job:
        return  # as nearly always, and found out far sooner than what differs
    difference = _difference(job, accepted.effective_job)
    if difference is not None:
        path, asked, understood = difference
        raise ProtocolError(
            f"the server did not understand the option {path}: it was asked for"
            f" {asked} and would do {understood}"
        )


def check_receipt(receipt: ReceiptMessage, job: Job, m: int | None) -> None:
    """Check that a receipt is this job's.

    Raises:
        ProtocolError: It is not.
    """
    if receipt.m != m or receipt.job_id != job.job_id:
        raise ProtocolError(
            f"the server's receipt is for {receipt.m} rows of job {receipt.job_id!r},"
            f" and job {job.job_id!r} had {m}"
        )


def _with_defaults(asked: Job, understood: Job) -> Job:
    """What was asked, with what `understood` chose where most jobs ask nothing."""
    filled = Job()
    filled.CopyFrom(asked)
    if not asked.numerics.dw_accumulator:
        filled.numerics.dw_accumulator = understood.numerics.dw_accumulator
    return filled


def _difference(
    asked: Message, understood: Message, path: str = ""
) -> tuple[str, Any, Any] | None:
    """The first option in which two headers differ, with both its values."""
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
