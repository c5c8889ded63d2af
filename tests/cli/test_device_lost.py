"""`gradwire serve` when a device fails for good: it ends, and says why."""

from __future__ import annotations

import json
import subprocess
import sys

import grpc
import pytest

from tests.cli.conftest import TIMEOUT_S, environment
from tests.support.raw import Stream, whole_numbers

PROBLEM = whole_numbers(160, 5, 4)


def start(stream: Stream) -> int:
    stream.send(PROBLEM.job())
    return stream.receive_accepted().accepted.device.index


def send_rows(stream: Stream) -> None:
    stream.send_all(PROBLEM.body(stream.outcome.accepted.block_rows))
    stream.half_close()


@pytest.mark.parametrize("other", ["waits", "hangs"])
def test_the_process_ends_with_a_status_and_a_log_line(other: str) -> None:
    """Whatever the other device does: it may hang in its driver."""
    script = [sys.executable, "-m", "tests.cli.losing_server", other]
    process = subprocess.Popen(
        [
            *script,
            "serve",
            "--listen=127.0.0.1:0",
            "--row-block-bytes=600",
            "--grace=600",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment({"GRADWIRE_LOG_FORMAT": "json"}),
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split(" serves on ")[1].split(" (")[0]
        with (
            grpc.insecure_channel(address) as channel,
            Stream(channel) as beside,
            Stream(channel) as unlucky,
        ):
            assert start(beside) == 0
            if other == "hangs":
                send_rows(beside)
                assert process.stdout.readline() == "hangs\n"
            assert start(unlucky) == 1
            send_rows(unlucky)
            assert unlucky.failure().reason == "DEVICE_LOST"
            assert beside.failure().status is grpc.StatusCode.UNAVAILABLE
        _, err = process.communicate(timeout=TIMEOUT_S)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    assert process.returncode == 1
    log = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    lost = next(entry for entry in log if entry["level"] == "critical")
    assert lost["device"] == "device 1 (a broken one)"
    assert lost["error"] == "an illegal memory access was encountered"
    if other == "waits":
        sentence = err.splitlines()[-1]
        assert sentence.startswith("gradwire: numpy's device 1 (a broken one) failed")
