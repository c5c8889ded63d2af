"""Calls whose path or metadata is no text, for which gRPC's server is not made."""

from __future__ import annotations

import grpc

from tests.contract.conftest import ROW_BLOCK_BYTES, assert_untroubled
from tests.support.http2 import Connection
from tests.support.observing import descriptors, wait_until
from tests.support.raw import Stream, compute_job, whole_numbers
from tests.support.serving import ServerProcess, running_server
from tests.support.sessions import RawSessions

PROBLEM = whole_numbers(40, 5, 4)
NO_TEXT = "/gradwire.v1.GradientService/\udcff\udcfe"


def is_answered(address: str) -> bool:
    """Whether a client that comes now finds a healthy server."""
    with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as own:
        check = own.unary_unary("/grpc.health.v1.Health/Check")
        try:
            return bool(check(b"", timeout=5) == b"\x08\x01")
        except grpc.RpcError:
            return False


def send_no_text(address: str) -> None:
    with Connection(address) as stranger:
        stranger.begin(NO_TEXT)
        stranger.wait_for_end()


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


def test_a_path_that_is_no_text_costs_nobody_else_anything(tmp_path) -> None:
    with running_server(
        listen=["127.0.0.1:0", f"unix:{tmp_path / 'socket'}"],
        health_listen="0",
        row_block_bytes=ROW_BLOCK_BYTES,
    ) as server:
        tcp, unix = server.addresses
        ports = (tcp, unix, server.health_address)
        with grpc.insecure_channel(tcp) as channel, Stream(channel) as stream:
            session = RawSessions(channel).open()
            session.put(1, PROBLEM.w)
            stream.send(PROBLEM.job())
            outcome = stream.receive_accepted()
            opened = descriptors(server.pid)
            for _ in range(3):
                for address in (tcp, server.health_address):
                    send_no_text(address)
                    for each in ports:
                        wait_until(lambda each=each: is_answered(each), each)
            # What ran goes on, and what was kept is there.
            stream.send_all(PROBLEM.body(outcome.accepted.block_rows))
            stream.half_close()
            stream.receive_results(outcome)
            assert outcome.bits == compute_job(channel, PROBLEM).bits
            assert session.get(1).tobytes() == PROBLEM.w.tobytes()
            session.close()
        wait_until(lambda: descriptors(server.pid) <= opened + 4, "all is freed")
        reopened = [r for r in server.records if "ports are open again" in r["message"]]
        assert len(reopened) == 6
        server.process.terminate()
        assert server.process.wait(20) == 0
        assert not (tmp_path / "socket").exists()
