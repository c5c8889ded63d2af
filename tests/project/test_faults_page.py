"""The page of faults says what the suite of faults tries."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest

from tests.thorough.faults.table import (
    BEHIND_PROXIES,
    FAULTS,
    PAGE,
    BehindProxy,
    page,
)


def test_the_page_is_the_one_that_the_table_makes() -> None:
    assert PAGE.read_text() == page()


def test_no_more_is_sampled_than_there_is() -> None:
    assert all(0 < fault.sampled <= fault.every for fault in FAULTS.values())


@pytest.mark.parametrize("row", BEHIND_PROXIES, ids=lambda row: row.tests[0])
def test_what_happens_behind_proxies_is_tried_as_often_as_the_page_says(
    row: BehindProxy,
) -> None:
    def cases(name: str) -> int:
        module, _, function = name.partition(".")
        test: Any = getattr(
            importlib.import_module(f"tests.proxies.{module}"), function
        )
        marks = [mark for mark in test.pytestmark if mark.name == "parametrize"]
        return math.prod(len(mark.args[1]) for mark in marks)

    assert sum(map(cases, row.tests)) == row.tried
