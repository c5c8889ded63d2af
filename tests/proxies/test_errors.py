"""Errors that only a proxy can cause are told as such, with the setting's name."""

from __future__ import annotations

import signal
import time
from typing import Any

import pytest

import gradwire
from gradwire._client.job_factory import Tuning
from tests.proxies.conftest import ready
from tests.proxies.running import (
    ENVOY,
    HAPROXY_HTTP,
    HAPROXY_TCP,
    KINDS,
    NGINX,
    Kind,
    running_proxy,
)
from tests.support import oracle
from tests.support.serving import ServerProcess, running_server

X, W, DY = oracle.operands(30_000, 60, 40)


@pytest.mark.parametrize("in_one_message", [True, False], ids=["compute", "stream"])
def test_nginxs_limit_of_a_requests_size_is_named(
    servers: tuple[ServerProcess, ServerProcess], in_one_message: bool
) -> None:
    """A call that has begun is reset, and others get an error page."""
    change = {"client_max_body_size 0": "client_max_body_size 1m"}
    addresses = [each.address for each in servers]
    x, dy = (X[:9000], DY[:9000]) if in_one_message else (X, DY)
    with (
        running_proxy(NGINX, addresses, change) as address,
        gradwire.connect(
            address, transport="grpc", timeout_s=60, retries=False
        ) as client,
    ):
        client._engine.jobs.tuning = Tuning(unary=in_one_message)
        with pytest.raises(gradwire.GradwireError) as told:
            client.gradients(x, W, dy)
    says = [str(told.value), *getattr(told.value, "__notes__", ())]
    assert any("client_max_body_size" in each for each in says)
    expected = gradwire.ConnectError if in_one_message else gradwire.ConnectionLostError
    assert type(told.value) is expected


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_no_server_behind_a_proxy_is_told_as_such(kind: Kind) -> None:
    """And a server that is back is found."""
    with running_server() as one, running_server() as other:
        addresses = [one.address, other.address]
        with (
            running_proxy(kind, addresses) as address,
            gradwire.connect(
                address, transport="grpc", retries=False, wait_for_ready_s=20
            ) as client,
        ):
            one.kill()
            other.kill()
            time.sleep(4)  # two failed checks, a second apart
            with pytest.raises(
                (gradwire.UnavailableError, gradwire.ConnectError)
            ) as no:
                client.forward([[2.0]], [[3.0]])
            if kind is not HAPROXY_TCP:  # which can say nothing
                assert "the proxy before" in str(no.value)
            with (
                running_server(listen=[one.address]),
                gradwire.connect(
                    address, transport="grpc", wait_for_ready_s=30
                ) as again,
            ):
                assert again.forward([[2.0]], [[3.0]]).item() == 6


SELDOM = {
    ENVOY: {"no_traffic_interval: 1s": "no_traffic_interval: 60s"},
    HAPROXY_HTTP: {"inter 1s": "inter 60s"},
}
"""No health checks meanwhile: they would find the servers dead first."""


@pytest.mark.parametrize(
    ("kind", "old", "new", "says"),
    [
        (NGINX, "grpc_read_timeout 1h", "grpc_read_timeout 1s", "grpc_read_timeout"),
        (HAPROXY_HTTP, "timeout server 1h", "timeout server 1s", "timeout server"),
        (ENVOY, "timeout: 0s", "timeout: 1s", "route's timeout"),
    ],
    ids=str,
)
def test_a_proxy_that_waits_too_short_names_its_timeout(
    kind: Kind, old: str, new: str, says: str
) -> None:
    with running_server() as one, running_server() as other:
        addresses = [one.address, other.address]
        with (
            running_proxy(
                kind, addresses, {old: new, **SELDOM.get(kind, {})}
            ) as address,
            gradwire.connect(
                address, transport="grpc", retries=False, wait_for_ready_s=20
            ) as client,
        ):
            for each in (one, other):
                each.process.send_signal(signal.SIGSTOP)
            try:
                with pytest.raises(gradwire.UnavailableError) as told:
                    client.forward([[2.0]], [[3.0]], timeout_s=60)
            finally:
                for each in (one, other):
                    each.process.send_signal(signal.SIGCONT)
    assert says in str(told.value)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("return 200 '<html>hello</html>'", "a web page|no gradwire server answered"),
        ("return 404", "without a route"),
        ("return 403", "does not allow"),
        ("proxy_pass http://gradwire", "not a gradwire server"),
    ],
)
def test_what_is_no_grpc_is_told_as_such(
    servers: tuple[ServerProcess, ServerProcess], answer: str, says: str
) -> None:
    addresses = [each.address for each in servers]
    change = {"grpc_pass grpc://gradwire": answer}
    with (
        running_proxy(NGINX, addresses, change) as address,
        pytest.raises(gradwire.GradwireError, match=says),
    ):
        gradwire.connect(address, connect_timeout_s=2)


def test_a_region_at_another_server_of_the_proxy_is_not_needed() -> None:
    """Both servers share memory, and the client is on their host."""
    shared: dict[str, Any] = {"allow_shared_memory": True}
    with running_server(**shared) as one, running_server(**shared) as other:
        expected = None
        for kind in (NGINX, ENVOY):
            with running_proxy(kind, [one.address, other.address]) as address:
                ready(address)
                for _ in range(3):
                    with gradwire.connect(address, timeout_s=60) as client:
                        result = client.gradients(X, W, DY)
                        bits = [each.tobytes() for each in result]
                        expected = expected or bits
                        assert bits == expected
