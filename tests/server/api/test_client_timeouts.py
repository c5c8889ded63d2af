"""How long a client is waited for, and when it is not its fault."""

from __future__ import annotations

import asyncio
import time

import pytest

from gradwire_server.api.client_timeouts import client_idle_timeout

IDLE_S = 0.2


async def test_a_client_that_does_nothing_is_waited_for_as_long_as_was_said() -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        async with client_idle_timeout(IDLE_S):
            await asyncio.Event().wait()
    assert IDLE_S <= time.monotonic() - began < 20 * IDLE_S


async def test_a_process_that_stood_still_hears_what_came_meanwhile() -> None:
    came = asyncio.Event()
    async with client_idle_timeout(IDLE_S):
        await asyncio.sleep(0)
        time.sleep(3 * IDLE_S)  # noqa: ASYNC251 - as if it had been stopped
        # What gRPC brings reaches the event loop a moment after its timers do.
        asyncio.get_running_loop().call_later(IDLE_S / 4, came.set)
        await came.wait()


async def test_after_that_its_client_is_waited_for_no_longer_than_before() -> None:
    began = 0.0

    async def stand_still_and_wait() -> None:
        nonlocal began
        async with client_idle_timeout(IDLE_S):
            await asyncio.sleep(0)
            time.sleep(3 * IDLE_S)  # noqa: ASYNC251 - as if it had been stopped
            began = time.monotonic()
            await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        await stand_still_and_wait()
    assert IDLE_S / 2 < time.monotonic() - began < 20 * IDLE_S


async def test_a_client_is_idle_only_since_it_last_did_something() -> None:
    loop = asyncio.get_running_loop()
    since = loop.time()
    loop.call_later(IDLE_S / 2, lambda: progress(loop.time()))

    def progress(at: float) -> None:
        nonlocal since
        since = at

    began = time.monotonic()
    with pytest.raises(TimeoutError):
        async with client_idle_timeout(IDLE_S, lambda: since):
            await asyncio.Event().wait()
    assert time.monotonic() - began >= IDLE_S * 1.4
