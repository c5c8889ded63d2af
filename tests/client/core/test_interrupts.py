"""Handlers of signals wait for what must not be interrupted."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from gradwire._core import interrupts


@pytest.fixture(autouse=True)
def _own_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    after = signal.signal(signal.SIGINT, before)
    assert after is signal.default_int_handler


def test_ctrl_c_waits_for_the_end_of_a_block() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - where it comes matters
        with interrupts.held():
            with interrupts.held():
                signal.raise_signal(signal.SIGINT)
                done.append("inner")
            time.sleep(0.05)
            done.append("outer")
        done.append("behind")
    assert done == ["inner", "outer"]


def test_a_handler_that_returns_is_called_once() -> None:
    seen: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: seen.append(number))
    try:
        with interrupts.held():
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.05)
            assert not seen
        time.sleep(0.05)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert seen == [signal.SIGTERM]


@pytest.mark.parametrize("early", [True, False])
def test_ctrl_c_ends_a_wait(early: bool) -> None:
    """Whether it comes during the wait or before."""
    condition = threading.Condition()
    began = time.monotonic()

    def interrupt() -> None:
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    if not early:
        threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt), interrupts.held():  # noqa: PT012
        if early:
            signal.raise_signal(signal.SIGINT)
        with interrupts.held(waits=True), condition:
            condition.wait(60)
    assert time.monotonic() - began < 10
    assert condition.acquire(blocking=False)  # it is not left locked
    condition.release()


def test_what_takes_too_long_is_interrupted(monkeypatch: Any) -> None:
    monkeypatch.setattr(interrupts, "PATIENCE_S", 0.1)
    with pytest.raises(KeyboardInterrupt), interrupts.held():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        time.sleep(30)


def test_other_threads_and_other_handlers_are_left_alone() -> None:
    handlers = []

    def work() -> None:
        with interrupts.held():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    work()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert handlers == [signal.default_int_handler, signal.SIG_IGN]


def test_a_handler_that_is_set_in_a_block_stays() -> None:
    with interrupts.held():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_the_child_of_another_thread_has_its_handlers() -> None:
    """The main thread is inside a block; the child goes on in the one that forks."""
    statuses = []

    def fork() -> None:
        child = os.fork()
        if not child:
            own = signal.getsignal(signal.SIGINT) is signal.default_int_handler
            os._exit(0 if own else 1)
        statuses.append(os.waitpid(child, 0)[1])

    with interrupts.held():
        thread = threading.Thread(target=fork)
        thread.start()
        thread.join()
    assert statuses == [0]


def test_the_child_of_the_main_thread_leaves_the_block() -> None:
    with interrupts.held():
        child = os.fork()
    own = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not child:
        os._exit(0 if own else 1)
    assert os.waitpid(child, 0)[1] == 0
