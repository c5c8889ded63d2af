"""Which jobs a spread product begins, and who computes them."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import gradwire
from gradwire._api.options import parse_options
from gradwire._api.types import receipt_of
from gradwire._arrays.buffer_pool import ResultPool
from gradwire._arrays.device_copy import HostCopies
from gradwire._arrays.operand import operand
from gradwire._client import spread_job
from gradwire._client.job_factory import JobFactory
from gradwire._client.spread_job import Part, SpreadJob
from gradwire._core import segments
from gradwire._core.job_plan import Plan, check, with_rows
from gradwire._core.outputs import ArrayOutputs, output_shapes
from gradwire._core.segments import Division
from gradwire._resilience.retry import RetryPolicy
from gradwire._resilience.segments_job import SegmentsJob, Taken
from gradwire_protocol.matrices import Matrix
from gradwire_protocol.v1 import matrix_pb2
from gradwire_protocol.v1.job_pb2 import Accepted
from gradwire_protocol.v1.job_pb2 import Receipt as ReceiptMessage

ROWS, N, K = 8, 3, 2
JOBS = 4
"""Two servers with two jobs each."""


class Product:
    """A product of some segments.

    Args:
        segments: Number of segments.
        several: Whether jobs take segments one by one.
    """

    def __init__(self, segments: int, *, several: bool = False) -> None:
        m = segments * ROWS
        rng = np.random.default_rng(0)
        operands = {
            Matrix.X: operand(rng.standard_normal((m, N)), "x"),
            Matrix.W: operand(np.zeros((N, K)), "w"),
            Matrix.DY: operand(np.zeros((m, K)), "dy"),
        }
        plan = with_rows(check(operands, parse_options()), m)
        self.outputs = outputs_of(plan, operands)
        factory = JobFactory(RetryPolicy(), None, None, {}, lambda pairs: None)
        self.job = SpreadJob(
            plan,
            operands,
            self.outputs,
            make=factory._part,
            make_of_segments=factory._segments_job,
            copies=HostCopies(),
        )
        self.job.spread.division = Division(m, ROWS, several)
        self.servers = {"a", "b"}
        self.job.start(lambda: self.servers)

    def at(self, address: str) -> Part:
        """Begin the next job at a server."""
        part = self.job.begin(JOBS)
        assert isinstance(part, Part)
        part.job.address = address
        if isinstance(part.job, SegmentsJob):
            there: Any = SimpleNamespace(accepted=accepted())
            part.job._exchange = there
        else:
            part.job.outputs.all()
        return part

    def end(self, part: Part) -> None:
        self.job.end(part, receipt_of(ReceiptMessage(), accepted()))

    def fail(self, part: Part) -> None:
        """End a job whose call was cancelled."""
        self.job.give_back(part, list(part.taken))
        self.job.fail(part, gradwire.JobCancelledError("cancelled"))

    def take(self, part: Part) -> Taken:
        taken = self.job.take(part)
        assert isinstance(taken, Taken)
        return taken

    def complete(self, part: Part, taken: Taken, value: float = 1.0) -> None:
        for array in taken.places.values():
            array[...] = value
        self.job.complete(part, taken, {Matrix.DW: np.full((N, K), value)})

    def complete_all(self, part: Part) -> None:
        """Compute whatever a job can take."""
        while isinstance(taken := self.job.take(part), Taken):
            self.complete(part, taken)


def outputs_of(plan: Plan, operands: Any) -> ArrayOutputs:
    return ArrayOutputs(plan, output_shapes(plan, operands), {}, ResultPool())


@pytest.fixture(autouse=True)
def no_timers_left() -> Iterator[None]:
    """Products that are not delivered wait for receipts a little longer."""
    yield
    for each in threading.enumerate():
        if isinstance(each, threading.Timer):
            each.cancel()
            each.join()


@pytest.fixture
def soon_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "LEAST_SLOW_S", 0.0)


@pytest.mark.usefixtures("soon_late")
def test_others_go_on_while_the_sums_of_those_ahead_can_be_held() -> None:
    product = Product(40)
    hung = [product.at("a"), product.at("a")]
    for _ in range(38):
        product.end(product.at("b"))
    for each in hung:
        duplicate = product.at("b")
        assert duplicate.duplicate
        assert duplicate.job.unusable == {"a"}
        product.end(duplicate)
        product.fail(each)
    assert product.job.begin(JOBS) is None


def test_a_product_that_begins_again_is_not_stopped_for_what_was_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spread_job, "RECEIPT_S", 0.05)
    product = Product(1)
    product.end(product.at("a"))  # its receipt is there, others' are waited for
    product.job.begin_again()
    product.job.spread.division = Division(ROWS, ROWS)
    product.job.start(lambda: product.servers)
    time.sleep(0.2)
    product.end(product.at("a"))


def test_the_sums_of_a_job_are_released_with_it() -> None:
    product = Product(2)
    gc.disable()  # it would release them, too, but only later
    try:
        succeeded, failed = product.at("a"), product.at("a")
        jobs = [weakref.ref(each.job) for each in (succeeded, failed)]
        product.end(succeeded)
        product.fail(failed)
        del succeeded, failed
        assert [each() for each in jobs] == [None, None]
    finally:
        gc.enable()


def test_jobs_take_segments_in_turn_and_few_at_a_time() -> None:
    product = Product(100, several=True)
    one, other = product.at("a"), product.at("b")
    first, second = product.take(one), product.take(other)
    assert (first.number, second.number) == (0, 1)
    while isinstance(product.job.take(one), Taken):
        pass
    assert len(one.taken) == 8
    assert isinstance(product.job.take(one), float)
    product.complete(one, first)
    assert product.take(one).number == 9


@pytest.mark.usefixtures("soon_late")
def test_a_job_computes_what_another_is_late_with() -> None:
    product = Product(40, several=True)
    hung, other = product.at("a"), product.at("b")
    cancelled_calls: list[str] = []
    assert hung.job.on_call is not None
    hung.job.on_call(lambda: cancelled_calls.append("a"))
    late = [product.take(hung), product.take(hung)]
    product.complete_all(other)
    product.end(other)
    again = product.at("b")
    assert again.duplicate
    assert again.job.unusable == {"a"}
    product.complete_all(again)
    assert cancelled_calls == ["a"]
    assert hung.job.late
    # Until it has left, it may write its results where the caller gets them.
    y = product.outputs.present()[Matrix.Y]
    assert not (y[: 2 * ROWS] == 1.0).all()
    late[0].places[Matrix.Y][...] = 5.0
    product.fail(hung)
    assert (y == 1.0).all()
    product.end(again)
    receipt = product.job.deliver()
    assert len(receipt.segments) == 40
    assert (product.outputs.present()[Matrix.DW] == 40.0).all()


@pytest.mark.usefixtures("soon_late")
def test_both_of_two_results_may_come() -> None:
    product = Product(20, several=True)
    slow, other = product.at("a"), product.at("b")
    taken = product.take(slow)
    product.complete_all(other)
    product.end(other)
    again = product.at("b")
    duplicate = product.take(again)
    assert (duplicate.number, duplicate.duplicate) == (taken.number, True)
    product.complete(slow, taken, 1.0)
    product.complete(again, duplicate, 7.0)
    product.end(slow)
    product.end(again)
    product.job.deliver()
    assert (product.outputs.present()[Matrix.Y] == 1.0).all()
    assert (product.outputs.present()[Matrix.DW] == 20.0).all()


def test_what_a_job_gives_back_goes_first() -> None:
    product = Product(40, several=True)
    failed, other = product.at("a"), product.at("b")
    for _ in range(3):
        product.take(failed)
    product.complete(other, product.take(other))
    product.job.give_back(failed, list(failed.taken))
    assert [product.take(other).number for _ in range(4)] == [0, 1, 2, 4]


def test_a_job_at_a_server_that_has_left_takes_no_more() -> None:
    product = Product(40, several=True)
    part = product.at("a")
    product.take(part)
    product.servers = {"b"}
    assert product.job.take(part) is None
    product.servers = set()  # the last one, which has just failed
    assert product.take(part).number == 1


def test_a_job_takes_segments_for_some_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    product = Product(40, several=True)
    part = product.at("a")
    product.take(part)
    monkeypatch.setattr(spread_job, "JOB_S", 0.0)
    assert product.job.take(part) is None


def test_nobody_waits_long_for_receipts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread_job, "RECEIPT_S", 0.01)
    product = Product(4, several=True)
    part = product.at("a")
    over = threading.Event()
    assert part.job.on_call is not None
    part.job.on_call(over.set)
    product.complete_all(part)
    assert over.wait(10)
    product.fail(part)
    receipt = product.job.deliver()
    assert receipt.m == 4 * ROWS
    assert [each.server_address for each in receipt.segments] == ["a"] * 4
    assert [each.device for each in receipt.segments] == [None] * 4


def accepted() -> Accepted:
    message = Accepted(block_rows=ROWS)
    message.effective_job.dtype = matrix_pb2.DTYPE_FLOAT64
    return message


def test_a_job_that_has_completed_nothing_is_not_waited_for() -> None:
    product = Product(4, several=True)
    silent, other = product.at("a"), product.at("b")
    over = threading.Event()
    assert silent.job.on_call is not None
    silent.job.on_call(over.set)
    product.complete_all(other)
    assert over.is_set()
    product.fail(silent)
    product.end(other)
    assert product.job.begin(JOBS) is None


def test_the_last_segments_are_left_to_jobs_that_have_none() -> None:
    product = Product(4, several=True)
    parts = [product.at(each) for each in "abab"]
    assert product.take(parts[0]).number == 0
    assert isinstance(product.job.take(parts[0]), float)
    assert [product.take(each).number for each in parts[1:]] == [1, 2, 3]


def test_a_change_between_the_look_and_the_wait_is_not_missed() -> None:
    product = Product(100, several=True)
    part = product.at("a")
    first = product.take(part)
    while isinstance(product.job.take(part), Taken):
        pass
    news = product.job.news
    assert isinstance(product.job.take(part), float)
    product.complete(part, first)
    begun = time.monotonic()
    product.job.wait(news, 10)
    assert time.monotonic() - begun < 5
    assert product.take(part).number == 8


def test_messages_that_wait_are_woken_by_what_comes_while_they_look() -> None:
    product = Product(100, several=True)
    part = product.at("a")
    assert isinstance(part.job, SegmentsJob)
    woken: list[bool] = []
    part.job.wake = lambda: woken.append(True)
    batches = part.job._batches(part.job._now)
    assert all(next(batches) is not None for _ in range(8))
    take, segments = product.job.take, part.job._required()

    def look() -> Any:
        found = take(part)
        product.job.tell()  # another thread has just completed something
        return found

    segments.take = look  # type: ignore[method-assign]
    before = set(threading.enumerate())
    assert next(batches) is None
    assert woken
    (timer,) = set(threading.enumerate()) - before
    batches.close()  # type: ignore[attr-defined]
    timer.join(0.5)  # it refers to the call
    assert not timer.is_alive()


def test_what_follows_a_callback_that_raises_is_computed_again() -> None:
    product = Product(100, several=True)
    part = product.at("a")
    assert isinstance(part.job, SegmentsJob)
    assert part.job.rows_at(ROWS, ROWS) is not None  # it has taken two
    complete = product.job.complete

    def report(*args: Any) -> None:
        complete(*args)
        raise gradwire.ConnectionLostError("of a callback", status=None)

    product.job.complete = report  # type: ignore[method-assign]
    with pytest.raises(gradwire.ConnectionLostError):
        part.job._completed(2)
    part.job.give_back()
    assert [product.take(product.at("b")).number for _ in range(2)] == [1, 2]
