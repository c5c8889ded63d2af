"""What regions hold while they are opened, and after they were given up."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.limits import MIB
from gradwire_server.admission.controller import Admission
from gradwire_server.errors import JobError
from gradwire_server.memory import shared_regions
from gradwire_server.memory.shared_regions import Regions
from gradwire_server.scheduling.device_selector import DeviceSelector


@pytest.fixture
def admission() -> Admission:
    return Admission(
        memory_limit=256 * MIB, max_jobs=1, max_queue=1, devices=DeviceSelector()
    )


def as_it_is(memory: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return memory


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def hold_open(opened: Regions, size_bytes: int) -> None:
    async with opened.open(size_bytes):
        await asyncio.Event().wait()


@contextmanager
def occupied_executor() -> Iterator[threading.Event]:
    """The event loop's threads, that do nothing until the event is set."""
    busy, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        busy.set()
        go_on.wait(20)

    pool = ThreadPoolExecutor(1)
    asyncio.get_running_loop().set_default_executor(pool)
    pool.submit(wait)
    assert busy.wait(20)
    try:
        yield go_on
    finally:
        go_on.set()


async def test_a_region_given_up_while_it_takes_its_pages_counts_until_it_stops(
    admission: Admission, monkeypatch: pytest.MonkeyPatch
) -> None:
    taking, go_on = threading.Event(), threading.Event()

    def allocate(*_: object) -> None:
        taking.set()
        go_on.wait(20)

    monkeypatch.setattr(shared_regions, "_allocate", allocate)
    opened = Regions(admission, as_it_is)
    task = asyncio.create_task(hold_open(opened, 100 * MIB))
    assert await asyncio.to_thread(taking.wait, 20)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
        assert admission.held_bytes == 100 * MIB
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert admission.held_bytes == 0


async def test_regions_that_are_given_up_at_once_leave_no_descriptor(
    admission: Admission,
) -> None:
    opened, before = Regions(admission, as_it_is), open_files()
    with occupied_executor() as go_on:
        tasks = [asyncio.create_task(hold_open(opened, MIB)) for _ in range(8)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.sleep(0)
        go_on.set()
        await asyncio.wait(tasks)
    assert open_files() == before
    assert admission.held_bytes == 0


async def test_a_region_that_is_given_up_takes_no_more_pages(
    admission: Admission, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    loop = asyncio.get_running_loop()

    def fallocate(_: int, first: int, __: int) -> None:
        taken.append(first)
        # By the time that the next piece is due, the client has gone.
        asyncio.run_coroutine_threadsafe(give_up(), loop).result(20)

    async def give_up() -> None:
        task.cancel()
        await asyncio.sleep(0)

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    task = asyncio.create_task(hold_open(Regions(admission, as_it_is), 200 * MIB))
    with pytest.raises(asyncio.CancelledError):
        await task
    assert taken == [0]


async def test_what_a_backend_did_to_a_region_ends_before_its_memory_goes(
    admission: Admission,
) -> None:
    """Also if the task is cancelled once more while the region is closed."""
    ended = threading.Event()

    class Owner:
        """Of an array over memory that the backend knows."""

        def __init__(self, memory: npt.NDArray[np.uint8]) -> None:
            self._memory = memory
            self.__array_interface__ = memory.__array_interface__

        def __del__(self) -> None:
            assert self._memory[0] == 7  # it is still mapped
            ended.set()

    def pin(memory: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        return np.asarray(Owner(memory))

    async def use() -> None:
        async with Regions(admission, pin).open(MIB) as region:
            region.memory[0] = 7
            opened.set()
            await asyncio.Event().wait()

    opened = asyncio.Event()
    task = asyncio.create_task(use())
    await opened.wait()
    assert not ended.is_set()
    with occupied_executor() as go_on:
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()
        assert await asyncio.to_thread(ended.wait, 20)


async def test_a_process_without_descriptors_is_busy(
    admission: Admission, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "memfd_create", none_left)
    with pytest.raises(JobError, match="no descriptors left") as caught:
        async with Regions(admission, as_it_is).open(MIB):
            pass
    assert caught.value.reason is Reason.BUSY
    assert admission.held_bytes == 0


async def test_regions_leave_room_for_the_calls_that_use_them() -> None:
    admission = Admission(128 * MIB, max_jobs=4, max_queue=4, devices=DeviceSelector())
    opened = Regions(admission, as_it_is)
    async with AsyncExitStack() as held:

        async def fill() -> None:
            while True:
                held.enter_context(admission.call())
                await held.enter_async_context(opened.open(MIB))

        with pytest.raises(JobError, match="the server is busy"):
            await fill()
        for _ in range(3):
            held.enter_context(admission.call())


async def test_a_tenants_regions_leave_descriptors_to_others(
    admission: Admission,
) -> None:
    opened = Regions(admission, as_it_is)
    async with AsyncExitStack() as stack:
        for _ in range(64):
            await stack.enter_async_context(opened.open(1, "alice"))
        with pytest.raises(JobError, match="64 regions of your tenant are open"):
            await stack.enter_async_context(opened.open(1, "alice"))
        bobs = await stack.enter_async_context(opened.open(1, "bob"))
        with pytest.raises(JobError) as caught, opened.used([bobs.token], "alice"):
            pass
        assert caught.value.reason is Reason.NOT_ALLOWED
        with opened.used([bobs.token], "bob") as found:
            assert found == [bobs]
    async with opened.open(1, "alice"):
        pass
    assert admission.held_bytes == 0
