"""The page of faults says what the suite of faults tries."""

from __future__ import annotations

from tests.thorough.faults.table import FAULTS, PAGE, page


def test_the_page_is_the_one_that_the_table_makes() -> None:
    assert PAGE.read_text() == page()


def test_no_more_is_sampled_than_there_is() -> None:
    assert all(0 < fault.sampled <= fault.every for fault in FAULTS.values())
