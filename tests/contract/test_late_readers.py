"""Clients that read the first message of their call late, or never."""

from __future__ import annotations

import struct
import time
from typing import Any

import pytest

from gradwire.v1 import job_pb2
from tests.contract.conftest import serving_both
from tests.support import http2
from tests.support.raw import SERVICE, Request, chunk, whole_numbers
from tests.support.serving import ServerProcess

IDLE_S = 1.0
PROBLEM = whole_numbers(4, 3, 2)
X_FIRST = chunk("x", 0, b"\0" * 4)


class LateReader(http2.Connection):
    """A connection with one ComputeStream call, of which it reads nothing at first."""

    def __init__(self, address: str, *messages: Any, end: bool = False) -> None:
        super().__init__(address, window_bytes=0)
        self._call = self.begin(f"/{SERVICE}/ComputeStream")
        for position, message in enumerate(messages, 1):
            data = _encoded(message)
            framed = b"\0" + struct.pack(">I", len(data)) + data
            self.send(self._call, framed, end=end and position == len(messages))

    def read_to_end(self) -> None:
        self.read(self._call, 1 << 20)
        assert self.wait_for_end() == self._call


def _encoded(message: Any) -> bytes:
    if isinstance(message, bytes):
        return message
    if isinstance(message, job_pb2.Job):
        message = Request(job=message)
    return bytes(message.SerializeToString())


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (b"\xff\xff", "MESSAGE_MALFORMED"),
        (PROBLEM.job(), "MESSAGE_UNEXPECTED"),
        (X_FIRST, "ORDER_INVALID"),
    ],
)
def test_an_error_of_what_comes_before_accepted_is_read_after_it(
    small_blocks: ServerProcess, second: Any, reason: str
) -> None:
    job_id = f"late-{reason}"
    header = PROBLEM.job(job_id=job_id)
    with LateReader(small_blocks.address, header, second) as client:
        record = small_blocks.wait_for_log(job_id)
        assert record["reason"] == reason
        client.read_to_end()


def test_a_stream_without_end_is_refused_after_accepted(
    small_blocks: ServerProcess,
) -> None:
    header = PROBLEM.job(job_id="late-end")
    with LateReader(small_blocks.address, header, end=True) as client:
        assert small_blocks.wait_for_log("late-end")["reason"] == "END_MISSING"
        client.read_to_end()


def test_one_that_reads_too_late_is_told_so() -> None:
    with (
        serving_both(idle_timeout=IDLE_S / 2) as server,
        LateReader(server.address, PROBLEM.job(job_id="too-late")) as client,
    ):
        record = server.wait_for_log("too-late")
        assert record["reason"] == "CLIENT_IDLE"
        assert "did not read" in record["error"]
        client.read_to_end()


def test_its_time_to_send_begins_when_accepted_has_left() -> None:
    with (
        serving_both(idle_timeout=IDLE_S) as server,
        LateReader(server.address, PROBLEM.job(job_id="silent")) as client,
    ):
        time.sleep(IDLE_S / 2)  # it takes so long to read
        began = time.monotonic()
        client.read_to_end()
        assert time.monotonic() - began >= IDLE_S * 0.9
        error = server.wait_for_log("silent")["error"]
        assert error.endswith("expected the first chunk of an operand, or end")
