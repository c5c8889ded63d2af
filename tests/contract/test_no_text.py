"""Calls whose path or metadata is no text, for which gRPC's server is not made."""

from __future__ import annotations


from tests.contract.conftest import assert_untroubled
from tests.support.http2 import Connection
from tests.support.serving import ServerProcess


def test_metadata_that_is_no_text_fills_no_log(small_blocks: ServerProcess) -> None:
    logged = len(small_blocks.records)
    metadata = {f"x-{number}": "\udcff" for number in range(40)}
    metadata |= {"\udcfe": "x", "gradwire-report": "wrong"}
    metadata["gradwire-report-job"] = "a\nb\x1b[2J\udcff"
    with Connection(small_blocks.address) as stranger:
        stranger.begin("/gradwire.v1.GradientService/GetServerInfo", metadata)
        stranger.wait_for_end()
    reports = [r for r in small_blocks.records[logged:] if r["levelname"] != "DEBUG"]
    assert [(r["report"], r["job_id"]) for r in reports] == [("wrong", "")]
    assert_untroubled(small_blocks)
