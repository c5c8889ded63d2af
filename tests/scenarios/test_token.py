"""Clients of a server that asks who they are."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradwire
from tests.scenarios import ways
from tests.scenarios.callers import CALLERS
from tests.scenarios.ways import Way
from tests.support.certificates import Authority
from tests.support.credentials import make_tokens
from tests.support.serving import ServerProcess, running_server

WRONG = "gw_wrong-wrong-wrong-wrong-wrong-wrong-wrong-wr"
X, W, DY = (np.ones(shape, np.float32) for shape in ((300, 20), (20, 10), (300, 10)))


TOKENS, TEXT = make_tokens("alice")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    file: Path = tmp_path_factory.mktemp("credentials") / "tokens.toml"
    file.write_text(TEXT)
    with ways.serving_all(auth_tokens=str(file), row_block_bytes=4096) as server:
        yield server


def with_token(way: Way, token: Any) -> Way:
    return Way(way.name, {**way.options, "token": token}, way.unix, way.in_one_message)


@pytest.mark.parametrize("kind", CALLERS)
@pytest.mark.parametrize("way", ways.WAYS, ids=str)
def test_the_token_goes_with_every_call_on_every_way(
    guarded: ServerProcess, kind: str, way: Way
) -> None:
    asked: list[None] = []

    def token() -> str:
        asked.append(None)
        return TOKENS["alice"]

    caller = CALLERS[kind](with_token(way, token), guarded)
    try:
        for _ in range(2):
            before = len(asked)
            y, _, dw = caller.run(caller.client.gradients(X, W, DY))
            assert (y[0, 0], dw[0, 0]) == (20, 300)
            assert len(asked) > before
    finally:
        caller.close()


async def enter(address: str, token: str | None) -> None:
    async with gradwire.AsyncClient(address, token=token):
        pass


def connect_async(address: str, token: str | None) -> None:
    asyncio.run(enter(address, token))


def connect(address: str, token: str | None) -> None:
    gradwire.connect(address, token=token)


@pytest.mark.parametrize("token", [None, WRONG])
@pytest.mark.parametrize("connect", [connect, connect_async])
def test_who_has_no_token_or_a_wrong_one_is_told_so(
    guarded: ServerProcess, connect: Any, token: str | None
) -> None:
    with pytest.raises(gradwire.AuthenticationError) as refused:
        connect(guarded.address, token)
    assert refused.value.reason is gradwire.Reason.CREDENTIALS_INVALID
    shown = "".join(traceback.format_exception(refused.value))
    assert WRONG not in shown + repr(vars(refused.value))


def test_a_token_may_be_renewed_and_fail_to_be(guarded: ServerProcess) -> None:
    now: list[str] = [TOKENS["alice"]]
    with gradwire.connect(
        guarded.address, transport="grpc", token=lambda: now[0]
    ) as client:
        client.forward(X, W)
        now[0] = WRONG
        with pytest.raises(gradwire.AuthenticationError):
            client.forward(X, W)
        now.clear()
        with pytest.raises(IndexError):  # what the callable raises
            client.forward(X, W)
        now.append(TOKENS["alice"])
        client.forward(X, W)


def test_over_tls_a_token_goes_to_wherever_the_certificate_is_good(
    tmp_path: Path,
) -> None:
    authority = Authority()
    cert, key = authority.issue("localhost", "127.0.0.1").write(tmp_path, "server")
    (tmp_path / "tokens.toml").write_text(TEXT)
    with running_server(
        tls_cert=cert, tls_key=key, auth_tokens=str(tmp_path / "tokens.toml")
    ) as server:
        tls = gradwire.Tls(ca=authority.cert)
        with gradwire.connect(server.address, tls=tls, token=TOKENS["alice"]) as client:
            assert client.forward(X, W)[0, 0] == 20
            assert TOKENS["alice"] not in repr(client)


def test_no_secret_shows_in_the_log(guarded: ServerProcess) -> None:
    with gradwire.connect(guarded.address, token=TOKENS["alice"]) as client:
        client.forward(X, W)
    with pytest.raises(gradwire.AuthenticationError):
        connect(guarded.address, WRONG)
    guarded.wait_for_log("CREDENTIALS_INVALID")
    for secret in (WRONG, TOKENS["alice"]):
        assert secret.removeprefix("gw_") not in guarded.logs
