"""Metrics, where no client can tell them."""

from __future__ import annotations

import re

import pytest

from gradwire_server.observability.figures import TenantUse
from gradwire_server.observability.prometheus import _of_tenants, label_name
from gradwire_server.observability.totals import MOST_TENANTS, Totals
from tests.server.observability.test_totals import call


@pytest.mark.parametrize(
    ("library", "expected"),
    [
        ("numpy", "numpy"),
        ("cuda-driver", "cuda_driver"),
        ("__A.b c", "a_b_c"),
        ("7zip", "library_7zip"),
        ("python", "library_python"),
        ("-", "library_"),
    ],
)
def test_any_library_has_a_label(library: str, expected: str) -> None:
    assert label_name(library) == expected
    assert re.fullmatch("[a-z][a-z0-9_]*", expected)


def test_what_tenants_have_adds_up_also_with_more_tenants_than_are_named() -> None:
    totals = Totals(tenants=True)
    names = [f"tenant-{number}" for number in range(MOST_TENANTS + 10)]
    for name in names:
        totals.ended(call(name), None)
    found = totals.figures().tenants
    assert found is not None
    use = tuple(TenantUse(name, 1, 2, 3) for name in names)
    families = {each.name: each for each in _of_tenants(found, use)}
    for name, each in (
        ("gradwire_tenant_running_jobs", 1),
        ("gradwire_tenant_queued_jobs", 2),
        ("gradwire_tenant_memory_held_bytes", 3),
    ):
        samples = families[name].samples
        assert sum(sample.value for sample in samples) == each * len(names)
        assert len(samples) == MOST_TENANTS + 1
