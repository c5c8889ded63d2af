"""Any calls with a session: what succeeds counts once, what fails changes nothing."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.contract.conftest import assert_untroubled
from tests.contract.session_machine import AnySession, AnySessionStream
from tests.contract.test_any_stream import QUICK
from tests.support.serving import running_server


@pytest.fixture(scope="module")
def channel() -> Iterator[grpc.Channel]:
    with running_server(row_block_bytes=256) as server:
        with grpc.insecure_channel(server.address) as opened:
            yield opened
        assert_untroubled(server)


@pytest.mark.thorough
def test_any_calls_do_what_the_contract_says(channel):
    AnySession.channel = channel
    run_state_machine_as_test(
        AnySession, settings=settings(QUICK, max_examples=15, stateful_step_count=25)
    )


@pytest.mark.thorough
def test_any_stream_of_a_job_with_kept_matrices(channel):
    AnySessionStream.channels = (channel,)
    run_state_machine_as_test(
        AnySessionStream,
        settings=settings(QUICK, max_examples=25, stateful_step_count=10),
    )
