"""`gradwire check` finds the faults that a server could plausibly have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest

import gradwire as sdk
from gradwire_cli.checks.checks import CHECKS, run_checks
from gradwire_cli.checks.clients import Clients, open_clients
from gradwire_cli.commands.check import Report
from tests.cli.conftest import serving_with
from tests.support.faults import FAULTS, Fault, FaultyBackend


@pytest.fixture(scope="module")
def backend() -> FaultyBackend:
    return FaultyBackend()


@pytest.fixture(scope="module")
def clients(backend: FaultyBackend) -> Iterator[Clients]:
    """Clients of a server that computes with that backend."""
    with (
        serving_with(backend, allow_shared_memory=True) as address,
        open_clients(partial(sdk.connect, address, timeout_s=30)) as opened,
    ):
        assert opened.shared is not None
        assert opened.direct is not None
        # As if it were several, which is what some checks need.
        yield replace(opened, one=opened.messages)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_wrong_server_is_found_by_the_check_that_is_made_for_it(
    fault: Fault,
    backend: FaultyBackend,
    clients: Clients,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend.set(fault)
    fault.patch(monkeypatch)
    results = list(run_checks(clients, {fault.dtype}, 0, {fault.found_by}))
    assert not any(result.note for result in results)
    wrong = [result for result in results if not result.passed]
    assert wrong
    conclusion = Report("a server", results, 0.0).conclusion().plain
    assert f"{len(wrong)} of {len(results)} checks failed: " in conclusion
    assert f"{wrong[0].check} ({fault.dtype.label})" in conclusion


@pytest.mark.parametrize("name", CHECKS)
def test_every_check_finds_a_fault_and_passes_without_it(
    name: str, backend: FaultyBackend, clients: Clients
) -> None:
    dtypes = {fault.dtype for fault in FAULTS if fault.found_by == name}
    assert dtypes
    backend.set(None)
    results = list(run_checks(clients, dtypes, 1, {name}))
    assert results
    assert all(result.passed for result in results)
