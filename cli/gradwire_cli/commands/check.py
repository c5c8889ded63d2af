"""``gradwire check``."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Annotated

from cyclopts import App, Parameter
from rich.table import Table
from rich.text import Text

from gradwire import GradwireError
from gradwire_cli.checks.checks import run_checks
from gradwire_cli.checks.clients import open_clients
from gradwire_cli.checks.result import CheckResult
from gradwire_cli.errors import CommandError, ExitStatus
from gradwire_cli.options import FLAG, PLAINTEXT, Addresses, Seconds, SecurityOptions
from gradwire_cli.private_server import reachable
from gradwire_cli.terminal.tables import console
from gradwire_protocol.dtypes import Dtype

app = App(
    name="check",
    help="""
    Check that a server computes correctly.

    Compares gradients with finite differences along random directions, all
    results of every dtype with local float64 products (within the bound of
    rounding errors), integer sums of many shapes with the exact sums, and jobs
    sent in different ways with each other, bit by bit; of several servers also
    jobs that they compute together with those of one. Without --address, checks a
    private server in this process.

    Exits with 0 if every check passed, 1 if a check failed, and 3 if no server
    could be checked.
    """,
)


@app.default
def check(
    *,
    address: Addresses = (),
    security: SecurityOptions = PLAINTEXT,
    seed: int = 0,
    as_json: Annotated[bool, FLAG, Parameter(name="--json")] = False,
    connect_timeout: Seconds = 10.0,
    timeout: Seconds = 60.0,
) -> ExitStatus:
    """Check that a server computes correctly.

    Args:
        address: Server address: HOST:PORT or unix:PATH. Several servers take
            turns, and compute jobs together (spread).
        security: TLS and credentials.
        seed: Seed of the random operands.
        as_json: Print one JSON object instead of a table.
        connect_timeout: Time limit for the server's first answer.
        timeout: Time limit for one job.
    """
    began = time.perf_counter()
    results: list[CheckResult] = []
    try:
        with (
            reachable(address, security, connect_timeout, timeout) as (connect, name),
            console(sys.stderr).status(f"checking {name}") as status,
            open_clients(connect, address) as clients,
        ):
            info = clients.messages.server_info()
            offered = {Dtype.named(label) for label in info.dtypes}
            for result in run_checks(clients, offered, seed):
                status.update(f"checking {name}: {result.check}, {result.dtype}")
                results.append(result)
    except GradwireError as error:
        raise CommandError(str(error), ExitStatus.NOT_CHECKED) from error
    seconds = time.perf_counter() - began
    report = Report(name, results, seconds, clients.no_segments)
    if as_json:
        report.print_json()
    else:
        report.print_table()
    return ExitStatus.OK if report.passed else ExitStatus.FAILED


@dataclasses.dataclass(frozen=True)
class Report:
    """The results of all checks of a server."""

    server: str
    results: Sequence[CheckResult]
    seconds: float
    no_segments: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Addresses of servers that get no segments of spread jobs, and why."""

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(result.passed for result in self.results)

    def print_json(self) -> None:
        """Print one JSON object."""
        results = [
            # JSON cannot represent NaN and Inf as numbers.
            dataclasses.asdict(f)
            | {
                "error": f.error if math.isfinite(f.error) else str(f.error),
                "passed": f.passed,
            }
            for f in self.results
        ]
        json.dump(
            {
                "server": self.server,
                "passed": self.passed,
                "seconds": round(self.seconds, 3),
                "checks": results,
                "no_segments": dict(self.no_segments),
            },
            sys.stdout,
        )
        sys.stdout.write("\n")

    def print_table(self) -> None:
        """Print the worst result of each check, all failures, and the conclusion."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for title in ("check", "dtype", "m x n x k", "result"):
            table.add_column(title, no_wrap=True)
        for title in ("error", "bound"):
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column("")
        for result in _worst_of_each(self.results):
            table.add_row(
                result.check,
                result.dtype,
                " x ".join(map(str, result.shape or ())),
                result.result,
                f"{result.error:.2g}",
                f"{result.bound:.2g}",
                _verdict(result),
            )
        out = console()
        out.print(table)
        out.print(self.conclusion(), soft_wrap=True)
        for address, why in self.no_segments.items():
            out.print(
                f"{address} gets no segments of jobs with spread: {why}", soft_wrap=True
            )

    def conclusion(self) -> Text:
        """Return a sentence that names the failed checks."""
        wrong = [result for result in self.results if not result.passed]
        if not wrong:
            return Text(
                f"{self.server}: {len(self.results)} checks passed "
                f"in {self.seconds:.1f} s"
            )
        names = ", ".join(
            f"{check} ({', '.join(dict.fromkeys(f.dtype for f in group))})"
            for check, group in groupby(wrong, key=lambda result: result.check)
        )
        notes = "".join(
            f"\n{note}" for note in dict.fromkeys(f.note for f in wrong) if note
        )
        return Text.assemble(
            (f"{self.server}: {len(wrong)} of {len(self.results)} checks ", ""),
            ("failed", "bold red"),
            f": {names}{notes}",
        )


def _verdict(result: CheckResult) -> Text:
    if result.passed:
        return Text("ok", "green")
    return Text("ERROR" if result.note else "WRONG", "bold red")


def _worst_of_each(results: Iterable[CheckResult]) -> Iterable[CheckResult]:
    """The worst result of each check and dtype, and every failed result."""
    for _, group in groupby(results, key=lambda f: (f.check, f.dtype)):
        same = list(group)
        wrong = [result for result in same if not result.passed]
        yield from wrong or [max(same, key=_share_of_bound)]


def _share_of_bound(result: CheckResult) -> float:
    return result.error / result.bound if result.bound else 0.0
