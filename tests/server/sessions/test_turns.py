"""Jobs share a session, a step has it alone, first come, first served."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from gradwire_protocol import limits
from gradwire_server.sessions.turns import Turns


class Calls:
    """Jobs and steps that end when they are told.

    Attributes:
        running: Their names, in the order in which they began.
        told: What each job that waits is told: how many are ahead.
    """

    def __init__(self) -> None:
        self.turns = Turns()
        self.running: list[str] = []
        self.told: dict[str, list[int]] = {}
        self.told_thrice = asyncio.Event()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._ends: dict[str, asyncio.Event] = {}

    async def begin(self, *names: str) -> None:
        """Jobs have small letters, steps have capitals."""
        for name in names:
            self._ends[name] = asyncio.Event()
            self._tasks[name] = asyncio.create_task(self._call(name))
            await settle()

    async def _call(self, name: str) -> None:
        async def on_wait(ahead: int) -> None:
            self.told.setdefault(name, []).append(ahead)
            if len(self.told[name]) == 3:
                self.told_thrice.set()
            if name == "leaves":
                raise ConnectionError

        turn = self.turns.alone() if name.isupper() else self.turns.shared(on_wait)
        async with turn:
            self.running.append(name)
            try:
                await self._ends[name].wait()
            finally:
                self.running.remove(name)

    async def end(self, *names: str) -> None:
        for name in names:
            self._ends[name].set()
        await settle()

    async def cancel(self, *names: str) -> None:
        for name in names:
            self._tasks[name].cancel()
        await settle()


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 10))


def test_jobs_run_together_and_a_step_alone() -> None:
    async def test() -> None:
        calls = Calls()
        await calls.begin("a", "b", "S", "T", "c")
        assert calls.running == ["a", "b"]
        await calls.end("a")
        assert calls.running == ["b"]
        await calls.end("b")
        assert calls.running == ["S"]
        await calls.end("S")
        assert calls.running == ["T"]
        await calls.begin("d")
        await calls.end("T")
        assert calls.running == ["c", "d"]
        await calls.end("c", "d")

    run(test())


def test_a_job_does_not_pass_a_step_that_waits() -> None:
    async def test() -> None:
        calls = Calls()
        await calls.begin("a", "S", "b", "c")
        assert calls.running == ["a"]
        await calls.end("a")
        assert calls.running == ["S"]
        await calls.end("S")
        assert calls.running == ["b", "c"]
        await calls.end("b", "c")

    run(test())


@pytest.mark.parametrize("leaves", ["S", "a", "b"])
def test_one_that_leaves_holds_up_nobody(leaves: str) -> None:
    async def test() -> None:
        calls = Calls()
        await calls.begin("a", "S", "b")
        await calls.cancel(leaves)
        if leaves == "S":
            assert calls.running == ["a", "b"]
        await calls.end(*{"a", "S", "b"} - {leaves})
        await calls.begin("T")
        assert calls.running == ["T"]
        await calls.end("T")

    run(test())


@pytest.mark.parametrize("waits", ["b", "T"])
def test_one_that_leaves_when_its_turn_comes_returns_it(waits: str) -> None:
    async def test() -> None:
        calls = Calls()
        await calls.begin("S", waits)
        calls._ends["S"].set()
        await asyncio.sleep(0)  # S returns the turn; who waits has it, and sleeps on
        await calls.cancel(waits)
        await calls.begin("U")
        assert calls.running == ["U"]
        await calls.end("U")

    run(test())


def test_jobs_that_wait_are_told_again_how_many_are_ahead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "QUEUED_EVERY_S", 0.03)

    async def test() -> None:
        calls = Calls()
        await calls.begin("a", "b", "S", "c", "leaves", "d")
        await calls.told_thrice.wait()
        # Whose client does not hear it makes place for the others.
        with pytest.raises(ConnectionError):
            await calls._tasks["leaves"]
        assert calls.told["leaves"] == [4]
        assert set(calls.told["c"]) == {3}
        assert set(calls.told["d"]) <= {5, 4}
        assert calls.told["d"][-1] == 4
        await calls.end("a", "b")
        assert calls.running == ["S"]
        await calls.end("S")
        assert calls.running == ["c", "d"]
        assert not {"a", "b", "S"} & set(calls.told)
        await calls.end("c", "d")

    run(test())
