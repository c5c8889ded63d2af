"""The lookup of another tenant's session does what that of an unknown one does."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import secrets
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import pytest

from gradwire.v1 import session_service_pb2 as pb2
from gradwire_server import Server, Settings
from gradwire_server.errors import JobError
from gradwire_server.sessions.registry import Sessions
from tests.support.ranks import smallest_seen

OWNER, STRANGER = "owner", "stranger"


def _run(check: Callable[[Sessions, list[str], list[str]], None]) -> None:
    """Run a check with a server's sessions, their tokens, and tokens of nobody."""

    async def run() -> None:
        # Its sessions are open when it stops: it waits for none of them.
        settings = Settings(listen=("127.0.0.1:0",), backend="numpy", grace=0)
        server = Server(settings)
        await server.start()
        try:
            assert server._service is not None
            sessions = server._service.sessions
            request = pb2.OpenSessionRequest(keep_bytes=100)
            opened = [(await sessions.open(request, OWNER)).token for _ in range(50)]
            check(sessions, opened, [secrets.token_urlsafe(32) for _ in opened])
        finally:
            await server.drain()

    asyncio.run(run())


def use(sessions: Sessions, token: str) -> None:
    with (
        pytest.raises(JobError, match="no such session"),
        sessions.used(token, STRANGER),
    ):
        pass


def close(sessions: Sessions, token: str) -> None:
    assert sessions.close(token, STRANGER) is None


def _instructions(call: Callable[[], None]) -> list[tuple[str, int]]:
    """The bytecodes of Python that a call runs."""
    seen: list[tuple[str, int]] = []

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        frame.f_trace_opcodes = True
        if event == "opcode":
            seen.append((frame.f_code.co_qualname, frame.f_lasti))
        return trace

    before = sys.gettrace()
    gc.disable()  # other tests' callbacks of collections would be traced
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
        gc.enable()
    return seen


@pytest.mark.parametrize("act", [use, close])
def test_the_same_instructions_refuse_a_foreign_token_and_an_unknown_one(
    act: Callable[[Sessions, str], None],
) -> None:
    def check(sessions: Sessions, foreign: list[str], unknown: list[str]) -> None:
        act(sessions, foreign[0])  # what is done once is done
        one, other = (
            _instructions(lambda t=token: act(sessions, t))
            for token in (foreign[1], unknown[1])
        )
        assert len(one) > 10
        assert one == other
        with sessions.used(foreign[1], OWNER):  # the token is a good one
            pass

    _run(check)


@pytest.mark.big
def test_the_lookup_takes_the_same_time() -> None:
    def check(sessions: Sessions, foreign: list[str], unknown: list[str]) -> None:
        order = [0, 1] * 100_000
        random.Random(0).shuffle(order)
        found: list[list[int]] = [[], []]
        for number, kind in enumerate(order):
            token = "".join((foreign, unknown)[kind][number % len(foreign)])
            begun = time.perf_counter_ns()
            with contextlib.suppress(JobError), sessions.used(token, STRANGER):
                pass
            found[kind].append(time.perf_counter_ns() - begun)
        of_foreign, of_unknown = (np.array(each, float) for each in found)
        shift = smallest_seen(of_foreign, of_unknown, 1.0)
        medians = [float(np.median(each)) for each in (of_foreign, of_unknown)]
        figures = f"medians {medians} ns, {shift:.0f} ns would be seen"
        print(figures)
        # A few tokens may lie better in a table than a few others.
        assert abs(medians[0] - medians[1]) < 40, figures
        assert shift < 40, figures

    _run(check)
