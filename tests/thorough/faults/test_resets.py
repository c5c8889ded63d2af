"""Calls that a proxy resets, with every code of HTTP/2, after any message."""

from __future__ import annotations

import itertools

import pytest

from tests.support.frame_proxy import CODES, FrameProxy, Reset
from tests.support.proxy import Proxy
from tests.thorough.faults.conftest import (
    EXTENTS,
    Watched,
    both_clients,
    connected,
)
from tests.thorough.faults.jobs import JOBS, bits, compute
from tests.thorough.faults.table import FAULTS
from tests.thorough.faults.test_cuts import TIMEOUT_S, boundaries


@pytest.mark.parametrize("extent", EXTENTS)
def test_a_job_reset_behind_any_message_has_the_bits_of_one_that_was_not(
    watched: Watched, proxy: Proxy, extent: str
) -> None:
    with connected(proxy.address, timeout_s=TIMEOUT_S) as client:
        expected = {job: bits(compute(client, job), job) for job in JOBS}
        ends = boundaries(client, proxy)
    with (
        FrameProxy(watched.process.address) as resetting,
        both_clients(resetting.address, timeout_s=TIMEOUT_S) as clients,
    ):
        cases = list(itertools.product(CODES, clients, ends))
        for case in FAULTS["reset"].cases(cases, extent):
            code, kind, (job, of, after) = case
            resets = resetting.resets
            resetting.arm(Reset(code, of, after))
            result = compute(clients[kind], job)
            assert resetting.resets == resets + 1, case
            assert result.receipt.retried == ("UNAVAILABLE",), case
            assert bits(result, job) == expected[job], case
    watched.assert_clean()
