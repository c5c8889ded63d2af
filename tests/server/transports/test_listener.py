"""Addresses, and the sentences that say why one cannot be had."""

from __future__ import annotations

import asyncio
import logging
import socket
import stat
import threading
from pathlib import Path

import grpc
import pytest

from gradwire_server import ListenError, Server, Settings
from gradwire_server.transports import listener


@pytest.fixture
async def server():
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    yield server
    await server.stop(None)


async def refusal(server, address):
    with pytest.raises(ListenError) as caught:
        listener.bind(server, address)
    return str(caught.value)


async def test_port_0_takes_a_free_port_and_says_which(server):
    address = listener.bind(server, "127.0.0.1:0")
    await server.start()
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), timeout=5):
        assert int(port) > 0


@pytest.mark.parametrize(
    "address",
    ["", "127.0.0.1", ":1", "h:http", "h:65536", "h:-1", "h:²", "h:" + "1" * 5000],
)
async def test_what_is_no_address_is_refused_with_the_form_of_one(server, address):
    assert "expected HOST:PORT or unix:PATH" in await refusal(server, address)


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]"])
async def test_plaintext_where_others_can_listen_in_has_to_be_asked_for(
    server, host, caplog
):
    assert await refusal(server, f"{host}:0") == (
        f"cannot listen on {host}:0 in plaintext, which others than this host can "
        "read: give --tls-cert and --tls-key, or --insecure to have it so all the "
        "same"
    )
    with caplog.at_level(logging.WARNING, logger="gradwire_server"):
        listener.bind(server, f"{host}:0", insecure=True)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.address == f"{host}:0"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1.2.3"])
async def test_this_host_alone_may_be_served_in_plaintext(server, host, caplog):
    with caplog.at_level(logging.WARNING, logger="gradwire_server"):
        listener.bind(server, f"{host}:0")
    assert not caplog.records


async def test_a_taken_port_is_a_sentence(server):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        expected = f"cannot listen on {address}: address already in use"
        assert await refusal(server, address) == expected


async def test_an_unknown_host_is_a_sentence(server):
    assert "cannot listen on no.such.host.invalid:1: " in await refusal(
        server, "no.such.host.invalid:1"
    )


@pytest.mark.parametrize("host", ["a" * 70, "a..b"])
async def test_a_name_that_no_host_can_have_is_a_sentence(server, host):
    expected = f"cannot listen on {host}:0: no host has this name"
    assert await refusal(server, f"{host}:0") == expected


@pytest.mark.parametrize("path", ["", "/tmp/a,b"])
async def test_a_path_that_no_client_could_use_is_refused(server, path):
    assert "the path of a unix socket is expected" in await refusal(
        server, f"unix:{path}"
    )


async def test_a_unix_socket_is_its_owners_alone(server, tmp_path):
    address = listener.bind(server, f"unix:{tmp_path}/s")
    await server.start()
    mode = (tmp_path / "s").stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600
    assert address == f"unix:{tmp_path}/s"


async def test_a_socket_that_a_killed_server_left_is_taken_over(server, tmp_path):
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
        left.listen()
    assert listener.bind(server, f"unix:{path}") == f"unix:{path}"
    await server.start()
    async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
        await asyncio.wait_for(channel.channel_ready(), 10)
    await server.stop(None)


async def test_a_socket_that_is_just_being_made_is_left_alone(server, tmp_path):
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as starting:
        starting.bind(str(path))
        timer = threading.Timer(0.03, starting.listen)
        timer.start()
        try:
            text = await refusal(server, f"unix:{path}")
        finally:
            timer.join()
    assert "another server listens there" in text
    assert path.exists()


async def test_a_socket_in_use_is_a_sentence_and_stays_in_use(server, tmp_path):
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as used:
        used.bind(str(path))
        used.listen()
        assert "another server listens there" in await refusal(server, f"unix:{path}")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


async def test_a_path_that_is_no_socket_is_left_alone(server, tmp_path):
    path = tmp_path / "file"
    path.write_text("kept")
    assert "something that is no socket" in await refusal(server, f"unix:{path}")
    assert path.read_text() == "kept"


async def test_a_path_that_is_too_long_says_how_long(server, tmp_path):
    path = tmp_path / ("s" * 120)
    assert f"{len(str(path))} bytes" in await refusal(server, f"unix:{path}")


async def test_a_missing_directory_is_named(server, tmp_path):
    missing = tmp_path / "missing"
    assert f"there is no directory {missing}" in await refusal(
        server, f"unix:{missing}/s"
    )


async def test_of_several_addresses_one_bad_one_leaves_nothing_behind(tmp_path):
    path = Path(tmp_path / "s")
    server = Server(Settings(listen=(f"unix:{path}", "nonsense"), backend="numpy"))
    with pytest.raises(ListenError):
        await server.start()
    assert not path.exists()  # noqa: ASYNC240 - it is over


async def test_a_stopped_server_removes_its_socket(tmp_path):
    listen = (f"unix:{tmp_path}/s", "127.0.0.1:0")
    async with Server(Settings(listen=listen, backend="numpy")) as server:
        assert len(server.addresses) == 2
        assert (tmp_path / "s").exists()
    assert not (tmp_path / "s").exists()
