"""A page over HTTP, for well-behaved clients and for others."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import logging
import socket
from collections.abc import AsyncIterator, Mapping

import pytest

from gradwire_server import ListenError
from gradwire_server.transports import http_listener
from gradwire_server.transports.http_listener import HttpListener, Page


async def page(headers: Mapping[str, str]) -> Page:
    if headers.get("accept") == "trouble":
        raise RuntimeError("no page today")
    return Page(f"for {headers.get('user-agent', 'nobody')}\n".encode(), "text/x-test")


@pytest.fixture
async def address() -> AsyncIterator[str]:
    listening = HttpListener("0", "/page", page)
    await listening.start()
    yield listening.address
    await listening.close()


def fetch(
    address: str, method: str, path: str, **headers: str
) -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection(address, timeout=10)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, headers=named)
    answer = connection.getresponse()
    found = answer.status, answer.read().decode(), dict(answer.getheaders())
    connection.close()
    return found


async def asked(address: str, *args: str, **headers: str) -> tuple[int, str, dict]:
    return await asyncio.to_thread(fetch, address, *args, **headers)


async def raw(address: str, sent: bytes) -> bytes:
    host, _, port = address.partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(sent)
    try:
        return await asyncio.wait_for(reader.read(), 10)
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


async def test_the_page_is_had_by_get_and_its_head_by_head(address: str) -> None:
    assert address.startswith("127.0.0.1:")
    for path in ("/page", "/page?a=b"):
        status, text, headers = await asked(address, "GET", path, User_Agent="me")
        assert (status, text) == (200, "for me\n")
        assert headers["Content-Type"] == "text/x-test"
    status, text, headers = await asked(address, "HEAD", "/page", User_Agent="me")
    assert (status, text, headers["Content-Length"]) == (200, "", "7")


async def test_other_requests_are_told_what_is_wrong(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    status, text, _ = await asked(address, "GET", "/")
    assert (status, text) == (404, "404 Not Found: this port serves /page\n")
    status, _, headers = await asked(address, "POST", "/page")
    assert (status, headers["Allow"]) == (405, "GET, HEAD")
    for sent, expected in (
        (b"GET /page\r\n\r\n", b"HTTP/1.1 400 "),
        (b"PRI * HTTP/2.0\r\n\r\n", b"HTTP/1.1 505 "),
        (b"\xff\xfe\r\n\r\n", b"HTTP/1.1 400 "),
        (b"GET /page HTTP/1.1\r\na: " + b"b" * (1 << 16), b"HTTP/1.1 431 "),
    ):
        assert (await raw(address, sent))[: len(expected)] in {expected, b""}
    caplog.set_level(logging.ERROR, "gradwire_server")
    status, text, _ = await asked(address, "GET", "/page", Accept="trouble")
    assert (status, text) == (500, "500 Internal Server Error\n")
    assert "no page today" in str(caplog.records[0].exc_info)


async def test_slow_clients_are_cut_off_and_keep_nobody_else_out(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_listener, "_TIMEOUT_S", 0.3)
    host, _, port = address.partition(":")
    most = http_listener._MAX_CONNECTIONS
    slow = [await asyncio.open_connection(host, int(port)) for _ in range(most + 8)]
    for _, writer in slow:
        writer.write(b"GET /page HTTP/1.1\r\n")
    for reader, writer in slow:
        try:
            assert await asyncio.wait_for(reader.read(), 10) == b""
        except ConnectionResetError:
            pass
        finally:
            writer.close()
    status, _, _ = await asked(address, "GET", "/page")
    assert status == 200


async def test_clients_that_send_no_request_keep_nobody_out(address: str) -> None:
    host, _, port = address.partition(":")
    slow = []
    for _ in range(3):
        for _ in range(http_listener._MAX_CONNECTIONS):
            slow.append(await asyncio.open_connection(host, int(port)))
            slow[-1][1].write(b"GET /page HTTP/1.1\r\n")
        status, _, _ = await asked(address, "GET", "/page")
        assert status == 200
    for _, writer in slow:
        writer.close()


async def test_requests_that_have_come_are_answered_however_many_connect(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_listener, "_YOUNG_S", 60.0)
    goes_on, began = asyncio.Event(), asyncio.Semaphore(0)

    async def later(_: Mapping[str, str]) -> Page:
        began.release()
        await goes_on.wait()
        return Page(b"later")

    listening = HttpListener("0", "/page", later)
    await listening.start()
    get = b"GET /page HTTP/1.1\r\n\r\n"
    waiting = []
    for _ in range(http_listener._MAX_CONNECTIONS):
        waiting.append(asyncio.create_task(raw(listening.address, get)))
        await asyncio.wait_for(began.acquire(), 10)
    assert await raw(listening.address, get) == b""  # one too many
    goes_on.set()
    for each in waiting:
        assert (await each).endswith(b"\r\n\r\nlater")
    await listening.close()


async def test_closing_ends_open_connections_and_logs_no_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    listening = HttpListener("localhost:0", "/page", page)
    await listening.start()
    port = int(listening.address.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET ")
    await asked(listening.address, "GET", "/page")  # the one before is read by now
    await listening.close()
    with contextlib.suppress(ConnectionResetError):
        assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)
    assert not caplog.records


async def test_an_address_that_cannot_be_had_is_a_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(ListenError) as raised:
            HttpListener(port, "/page", page)
        assert str(raised.value) == (f"cannot listen on {port}: address already in use")
    for wrong in ("", ":1", "unix:/tmp/page", "host:http", "65536"):
        with pytest.raises(ListenError, match="expected HOST:PORT or PORT"):
            HttpListener(wrong, "/page", page)
