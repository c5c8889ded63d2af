from __future__ import annotations

import pytest

import gradwire
from gradwire._transport.address import channel_options, grpc_target
from gradwire_protocol import limits


@pytest.mark.parametrize(
    ("address", "target"),
    [
        ("gpu-node:50051", "dns:///gpu-node:50051"),
        ("127.0.0.1:1", "dns:///127.0.0.1:1"),
        ("[::1]:65535", "dns:///[::1]:65535"),
        ("unix:/run/gradwire.sock", "unix:/run/gradwire.sock"),
        ("unix:relative.sock", "unix:relative.sock"),
        ("unix:/run/a#1?%41", "unix:/run/a%231%3F%2541"),
        ("[fe80::1%eth0]:1", "dns:///[fe80::1%eth0]:1"),
    ],
)
def test_an_address_is_what_gradwire_serve_prints(address: str, target: str) -> None:
    assert grpc_target(address) == target


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("gpu-node", "has no port: expected HOST:PORT"),
        (":50051", "has no port: expected HOST:PORT"),
        ("", "has no port: expected HOST:PORT"),
        ("::1", "has no port"),
        ("[::1", "has no port"),
        ("gpu-node:http", "expected a number from 1 to 65535"),
        ("gpu-node:0", "expected a number from 1 to 65535"),
        ("gpu-node:65536", "expected a number from 1 to 65535"),
        ("http://gpu-node:50051", "is a URL or a path: expected HOST:PORT"),
        ("/run/gradwire.sock", "is a URL or a path: expected HOST:PORT or unix:PATH"),
        ("unix:", "has no path: expected unix:PATH"),
        ("unix:/" + "x" * 107, "has 108 bytes: expected at most 107"),
        ("unix:/run/a,b", "has a comma, at which gRPC would cut it"),
        ("localhost#1:50051", "has the host 'localhost#1': expected a name or an IP"),
        ("localhost?1:50051", "has the host 'localhost?1'"),
        ("local%68ost:50051", "has the host 'local%68ost'"),
        (" localhost:50051", "has the host ' localhost'"),
        ("local host:50051", "has the host 'local host'"),
        (50051, "expected a string, HOST:PORT or unix:PATH"),
    ],
)
def test_what_is_no_address_is_refused_with_what_to_write(
    address: str, says: str
) -> None:
    with pytest.raises(gradwire.InputError) as refused:
        gradwire.Client(address)
    assert says in str(refused.value)


def test_both_sides_receive_messages_of_the_same_size() -> None:
    options = dict(channel_options("gpu-node:50051"))
    assert options["grpc.max_receive_message_length"] == limits.MAX_MESSAGE_BYTES


def test_a_server_that_came_back_is_looked_for_twice_a_second() -> None:
    options = dict(channel_options("gpu-node:50051"))
    assert options["grpc.initial_reconnect_backoff_ms"] == 100
    assert options["grpc.max_reconnect_backoff_ms"] == 500
    assert options["grpc.dns_min_time_between_resolutions_ms"] == 1000


def test_a_proxy_from_the_environment_is_not_asked_for_this_host() -> None:
    assert dict(channel_options("127.0.0.1:1"))["grpc.enable_http_proxy"] == 0
    assert dict(channel_options("gpu-node:1"))["grpc.enable_http_proxy"] == 1
