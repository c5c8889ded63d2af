"""Which jobs a spread product begins, and who computes them."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import gradwire
from gradwire._api.options import parse_options
from gradwire._arrays.device_copy import HostCopies
from gradwire._arrays.operand import operand
from gradwire._client.spread_job import Part, SpreadJob
from gradwire._core import segments
from gradwire._core.job_plan import check, with_rows
from gradwire._core.segments import Division
from gradwire_protocol.matrices import Matrix

ROWS, N, K = 8, 3, 2
JOBS = 4
"""Two servers with two jobs each."""


class Job:
    """What a product knows of an `ArrayJob`."""

    def __init__(self, outputs: Any, plan: Any) -> None:
        self.outputs, self.plan = outputs, plan
        self.address = ""
        self.unusable: set[str] = set()
        self.segment_sums: list[Any] = []


class Product:
    """A product of some segments."""

    def __init__(self, segments: int) -> None:
        m = segments * ROWS
        operands = {
            Matrix.X: operand(np.zeros((m, N)), "x"),
            Matrix.W: operand(np.zeros((N, K)), "w"),
            Matrix.DY: operand(np.zeros((m, K)), "dy"),
        }
        plan = with_rows(check(operands, parse_options()), m)
        self.results = {each: np.zeros(plan.shape(each, m)) for each in plan.results}
        self.job = SpreadJob(
            plan,
            operands,
            SimpleNamespace(all=lambda: self.results),  # type: ignore[arg-type]
            make=self._make,  # type: ignore[arg-type]
            copies=HostCopies(),
        )
        self.job.spread.division = Division(m, ROWS)

    @staticmethod
    def _make(plan: Any, operands: Any, places: Any) -> Any:
        results = {each: np.zeros(plan.shape(each, plan.m)) for each in plan.results}
        outputs = SimpleNamespace(present=lambda: results)
        return Job(outputs, plan)

    def begin(self, address: str) -> Part | float | None:
        """Begin the next job at a server, if there is one."""
        part = self.job.begin(JOBS, {"a", "b"})
        if isinstance(part, Part):
            part.job.address = address
        return part

    def end(self, part: Part) -> None:
        self.job.end(part, None)  # type: ignore[arg-type]

    def at(self, address: str) -> Part:
        part = self.begin(address)
        assert isinstance(part, Part)
        return part


def test_others_go_on_while_the_sums_of_those_ahead_can_be_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(segments, "LEAST_SLOW_S", 0.0)
    product = Product(40)
    hung = [product.at("a"), product.at("a")]
    for _ in range(38):
        product.end(product.at("b"))
    for each in hung:
        duplicate = product.at("b")
        assert duplicate.duplicate
        assert duplicate.job.unusable == {"a"}
        product.end(duplicate)
        product.job.fail(each, cancelled())
    assert product.begin("b") is None


def test_the_sums_of_a_job_are_released_with_it() -> None:
    product = Product(2)
    gc.disable()  # it would release them, too, but only later
    try:
        succeeded, failed = product.at("a"), product.at("a")
        jobs = [weakref.ref(each.job) for each in (succeeded, failed)]
        product.end(succeeded)
        product.job.fail(failed, cancelled())
        del succeeded, failed
        assert [each() for each in jobs] == [None, None]
    finally:
        gc.enable()


def cancelled() -> gradwire.GradwireError:
    return gradwire.JobCancelledError("cancelled")
