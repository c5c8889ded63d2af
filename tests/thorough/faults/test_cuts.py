"""Connections that break, and bytes that change on the way."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from typing import get_args

import pytest

import gradwire
from tests.support import oracle
from tests.support.certificates import Authority
from tests.support.proxy import Direction, Fault, Proxy
from tests.thorough.faults.conftest import (
    EXTENTS,
    Client,
    Watched,
    both_clients,
    connected,
    watched_server,
)
from tests.thorough.faults.jobs import JOBS, M, W, bits, compute, parts, placed
from tests.thorough.faults.table import FAULTS

DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
TIMEOUT_S = 20.0
BYTES = {"requests": 4000, "responses": 4200}
"""How many pass at least when all results are computed; a few more or less are
frames of HTTP/2 that depend on the time."""
EVERY_THIRD, EVERY_FIFTH, EVERY_97TH = 3, 5, 97


@pytest.fixture
def clients(watched: Watched, proxy: Proxy) -> Iterator[dict[str, Client]]:
    """Both clients, which reach the server through the proxy."""
    with both_clients(proxy.address, timeout_s=TIMEOUT_S) as both:
        yield both
    watched.assert_clean()


@pytest.fixture
def client(clients: dict[str, Client]) -> Client:
    """One of them, where it makes no difference."""
    return clients["Client"]


def boundaries(client: Client, proxy: Proxy) -> list[tuple[str, Direction, int]]:
    """Behind which message of which job, and in which direction."""
    found = []
    for job in JOBS:
        proxy.arm(None)
        compute(client, job)
        for of in DIRECTIONS:
            found += [(job, of, after + 1) for after in range(proxy.messages[of])]
    return found


def test_a_job_has_as_many_messages_whenever_it_is_accepted(client, proxy):
    """Otherwise the table's numbers of cases would hold by chance only."""
    jobs = client._engine.jobs
    assert all(each.early_bytes for each in jobs.limits)
    expected = boundaries(client, proxy)
    for job in JOBS:  # accepted behind the first rows
        proxy.arm(Fault("responses", pause_after_bytes=1))
        resume = threading.Timer(0.1, proxy.resume)
        resume.start()
        compute(client, job)
        resume.join()
        for of in DIRECTIONS:
            assert proxy.messages[of] == len(
                [each for each in expected if each[:2] == (job, of)]
            )
    jobs.limits = ()  # before them
    assert boundaries(client, proxy) == expected


def bytes_of_a_job(step: int) -> list[tuple[Direction, int]]:
    return [(of, at) for of in DIRECTIONS for at in range(1, BYTES[of], step)]


@pytest.mark.parametrize("extent", EXTENTS)
def test_a_job_cut_behind_any_message_has_the_bits_of_one_that_was_not(
    clients, client, proxy, extent
):
    expected = {job: bits(compute(client, job), job) for job in JOBS}
    cases = list(itertools.product(clients, boundaries(client, proxy)))
    for kind, (job, of, after) in FAULTS["cut-message"].cases(cases, extent):
        faults = proxy.faults
        proxy.arm(Fault(of, cut_after_messages=after))
        result = compute(clients[kind], job)
        case = (kind, job, of, after)
        assert proxy.faults == faults + 1, case
        # gRPC may not know yet, and try the connection that is gone once more.
        assert set(result.receipt.retried) == {"UNAVAILABLE"}, case
        assert result.receipt.m == M
        assert bits(result, job) == expected[job], case


def once_connected(client: Client, job: str) -> gradwire.Gradients:
    """A job's results, from a client that may not know yet that it was cut off."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            return compute(client, job)
        except gradwire.ConnectionLostError:
            assert time.monotonic() < deadline


@pytest.mark.parametrize("extent", EXTENTS)
def test_without_retries_it_is_a_lost_connection_until_there_is_another(
    watched, proxy, extent
):
    with connected(proxy.address, timeout_s=TIMEOUT_S, retries=False) as client:
        expected = {job: bits(compute(client, job), job) for job in JOBS}
        for job, of, after in FAULTS["cut-told"].cases(
            boundaries(client, proxy), extent
        ):
            proxy.arm(Fault(of, cut_after_messages=after))
            with pytest.raises(gradwire.ConnectionLostError):
                compute(client, job)
            assert bits(once_connected(client, job), job) == expected[job]
    watched.assert_clean()


@pytest.mark.parametrize("extent", EXTENTS)
def test_a_job_cut_after_any_byte_has_the_bits_of_one_that_was_not(
    client, proxy, extent
):
    expected = bits(compute(client, "all results"), "all results")
    for of, after in FAULTS["cut-byte"].cases(bytes_of_a_job(EVERY_THIRD), extent):
        proxy.arm(Fault(of, cut_after_bytes=after))
        result = compute(client, "all results")
        assert bits(result, "all results") == expected, (of, after)


@pytest.mark.parametrize("extent", EXTENTS)
def test_a_stream_cut_behind_any_message_gives_every_row_once(
    clients, client, proxy, extent
):
    """Its rows come from a generator, which nobody can read twice."""
    proxy.arm(None)
    with client.stream(parts(), W) as stream:
        expected = placed(stream)
        expected_dw = stream.dw
    ends = [(of, i + 1) for of in DIRECTIONS for i in range(proxy.messages[of])]
    cases = list(itertools.product(clients, ends))
    for kind, (of, after) in FAULTS["cut-stream"].cases(cases, extent):
        faults = proxy.faults
        proxy.arm(Fault(of, cut_after_messages=after))
        with clients[kind].stream(parts(), W) as stream:
            found = placed(stream)
        case = (kind, of, after)
        assert proxy.faults == faults + 1, case
        for first_row, (y, dx) in found.items():
            assert oracle.same_bits(y, expected[first_row][0]), case
            assert oracle.same_bits(dx, expected[first_row][1]), case
        assert oracle.same_bits(stream.dw, expected_dw), case


@pytest.mark.parametrize("extent", EXTENTS)
def test_a_byte_that_changes_on_the_way_never_makes_a_wrong_result(extent):
    """Whichever byte it is: of elements, of messages, or of HTTP/2's frames.

    Where a length grows, both sides wait for what never comes.
    """
    cases = FAULTS["flip"].cases(bytes_of_a_job(EVERY_FIFTH), extent)
    right = 0
    with (
        watched_server(idle_timeout=0.3) as watched,
        Proxy(watched.process.address) as proxy,
    ):
        with connected(proxy.address) as client:
            expected = bits(compute(client, "all results"), "all results")
        for of, at in cases:
            # A connection whose streams got a wrong number may never be heard again.
            with connected(proxy.address, timeout_s=2.0) as client:
                proxy.arm(Fault(of, flip_byte=at))
                try:
                    result = compute(client, "all results", checksum=True)
                except gradwire.GradwireError:
                    continue
            assert bits(result, "all results") == expected, (of, at)
            right += 1
    assert right > len(cases) / 2


@pytest.mark.parametrize("extent", EXTENTS)
def test_over_tls_it_never_does_even_without_checksums(tmp_path, extent):
    authority = Authority()
    tls = gradwire.Tls(ca=authority.write(tmp_path))
    cert, key = authority.issue("127.0.0.1").write(tmp_path, "server")
    cases = FAULTS["flip-tls"].cases(bytes_of_a_job(EVERY_97TH), extent)
    right = 0
    with (
        watched_server(
            listen=[f"unix:{tmp_path / 'socket'}", "127.0.0.1:0"],
            tls_cert=cert,
            tls_key=key,
            idle_timeout=0.3,
        ) as watched,
        Proxy(watched.process.addresses[1]) as proxy,
    ):
        with connected(proxy.address, tls=tls) as client:
            expected = bits(compute(client, "all results"), "all results")
        for of, at in cases:
            with connected(proxy.address, tls=tls, timeout_s=2.0) as client:
                proxy.arm(Fault(of, flip_byte=at))
                try:
                    result = compute(client, "all results")
                except gradwire.DeadlineError:
                    continue
            assert bits(result, "all results") == expected, (of, at)
            right += 1
    assert right > len(cases) * 3 / 4


@pytest.mark.parametrize("extent", EXTENTS)
def test_elements_that_change_on_the_way_are_sent_again(client, proxy, extent):
    expected = bits(compute(client, "all results"), "all results")
    proxy.arm(None)
    compute(client, "all results", checksum=True)
    # The first message is a header, and the last has no elements either.
    cases = [(of, at) for of in DIRECTIONS for at in range(1, proxy.messages[of] - 1)]
    for of, at in FAULTS["flip-elements"].cases(cases, extent):
        proxy.arm(Fault(of, flip_in_message=at))
        result = compute(client, "all results", checksum=True)
        assert result.receipt.retried == ("CHECKSUM_MISMATCH",), (of, at)
        assert bits(result, "all results") == expected, (of, at)
