"""The outcome of a check, and the comparison of results with expected ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from gradwire_cli.checks.bounds import worst
from gradwire_cli.checks.clients import Clients
from gradwire_cli.checks.reference import (
    Products,
    Results,
    Shape,
    count_different,
    differences,
)
from gradwire_protocol.dtypes import Dtype


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The outcome of one check for one result."""

    check: str
    dtype: str
    shape: Shape | None
    """m, n and k."""

    result: str
    """``y``, ``dx``, ``dw`` or ``db``; ``all`` for all results together; ``as float32``
    for all, sent in that dtype."""

    error: float
    """Error of the element with the largest ratio of error to bound, or, for an
    exact check, the number of wrong elements."""

    bound: float
    """Bound on the error."""

    note: str = ""
    """Why the check could not run; empty if it ran."""

    @property
    def passed(self) -> bool:
        """Whether the check ran and the error is within the bound."""
        return not self.note and self.error <= self.bound


Check: TypeAlias = Callable[
    [Clients, Dtype, np.random.Generator], Iterator[CheckResult]
]


def same(
    check: str, job: Products, got: Results, expected: Results
) -> Iterator[CheckResult]:
    """Count the wrong elements of each result.

    Results that were not computed are left out.
    """
    for name in got:
        wrong = count_different({name: got[name]}, {name: expected[name]})
        yield CheckResult(check, job.dtype.label, job.shape, name, wrong, 0)


def same_in_all(
    check: str, job: Products, got: Results, expected: Results
) -> CheckResult:
    """Count the wrong elements of all results together."""
    wrong = count_different(got, expected)
    return CheckResult(check, job.dtype.label, job.shape, "all", wrong, 0)


def exact(check: str, job: Products, got: Results) -> Iterator[CheckResult]:
    """Compare results of integers with exact sums, rounded once."""
    for name, right in job.expected().items():
        error = 0.0
        if not np.array_equal(got[name], right):
            found, wanted = got[name], right.astype(np.float64)
            error, _ = worst(differences(found, wanted), np.zeros(()))
        yield CheckResult(check, job.dtype.label, job.shape, name, error, 0)
