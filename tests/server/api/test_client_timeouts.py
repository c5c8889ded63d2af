"""How long a client is waited for, and when it is not its fault."""

from __future__ import annotations

import asyncio
import time

import pytest

from gradwire_server.api.client_timeouts import IdleLimit

IDLE_S = 0.2


async def test_a_client_that_does_nothing_is_waited_for_as_long_as_was_said() -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError), IdleLimit(IDLE_S).wait():
        await asyncio.Event().wait()
    assert IDLE_S <= time.monotonic() - began < 20 * IDLE_S


async def test_a_process_that_stood_still_hears_what_came_meanwhile() -> None:
    came = asyncio.Event()
    with IdleLimit(IDLE_S).wait():
        await asyncio.sleep(0)
        time.sleep(3 * IDLE_S)  # noqa: ASYNC251 - as if it had been stopped
        # What gRPC brings reaches the event loop a moment after its timers do.
        asyncio.get_running_loop().call_later(IDLE_S / 4, came.set)
        await came.wait()


async def test_after_that_its_client_is_waited_for_no_longer_than_before() -> None:
    began = 0.0

    async def stand_still_and_wait() -> None:
        nonlocal began
        with IdleLimit(IDLE_S).wait():
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
    with pytest.raises(TimeoutError), IdleLimit(IDLE_S).wait(lambda: since):
        await asyncio.Event().wait()
    assert time.monotonic() - began >= IDLE_S * 1.4


async def test_each_wait_has_its_time_though_they_share_a_timer() -> None:
    limit, loop = IdleLimit(IDLE_S), asyncio.get_running_loop()
    for _ in range(5):  # together longer than the client may be idle
        with limit.wait():
            await asyncio.sleep(IDLE_S / 3)
    since = loop.time() - IDLE_S * 3 / 4  # sooner than the kept timer is due
    began = time.monotonic()
    with pytest.raises(TimeoutError), limit.wait(lambda: since):
        await asyncio.Event().wait()
    assert time.monotonic() - began < IDLE_S * 3 / 4
    with limit.wait():  # after an expired one, as before
        await asyncio.sleep(IDLE_S / 3)
    limit.close()


async def test_between_waits_nobody_is_idle() -> None:
    limit = IdleLimit(IDLE_S)
    with limit.wait():
        await asyncio.sleep(0)
    await asyncio.sleep(2 * IDLE_S)
    with limit.wait():
        await asyncio.sleep(IDLE_S / 2)
    limit.close()


async def test_a_task_that_others_cancel_is_cancelled_rather_than_late() -> None:
    async def wait() -> None:
        with IdleLimit(IDLE_S).wait():
            await asyncio.Event().wait()

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_the_time_is_up_for_the_wait_and_not_for_its_task() -> None:
    task = asyncio.current_task()
    assert task is not None
    with pytest.raises(TimeoutError), IdleLimit(IDLE_S).wait():
        await asyncio.Event().wait()
    assert task.cancelling() == 0
    await asyncio.sleep(0)
