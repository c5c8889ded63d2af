"""``gradwire check``."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Annotated

from cyclopts import App, Parameter
from rich.table import Table
from rich.text import Text

from gradwire import GradwireError
from gradwire_cli.checks.checks import Finding, run_checks
from gradwire_cli.errors import CommandError, ExitStatus
from gradwire_cli.options import FLAG, PLAINTEXT, Addresses, Seconds, SecurityOptions
from gradwire_cli.private_server import connected
from gradwire_cli.terminal.tables import console
from gradwire_protocol.dtypes import Dtype

app = App(
    name="check",
    help="""
    Check that a server computes correctly.

    Compares gradients with finite differences along random directions, all
    results of every dtype with local float64 products (within the bound of
    rounding errors), and integer sums over several row blocks with the exact
    sums. Without --address, checks a private server in this process.

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
            turns.
        security: TLS and credentials.
        seed: Seed of the random operands.
        as_json: Print one JSON object instead of a table.
        connect_timeout: Time limit for the server's first answer.
        timeout: Time limit for one job.
    """
    began = time.perf_counter()
    findings: list[Finding] = []
    try:
        with (
            connected(address, security, connect_timeout, timeout) as (client, name),
            console(sys.stderr).status(f"checking {name}") as status,
        ):
            offered = {Dtype.named(label) for label in client.server_info().dtypes}
            for finding in run_checks(client, offered, seed):
                status.update(f"checking {name}: {finding.check}, {finding.dtype}")
                findings.append(finding)
    except GradwireError as error:
        raise CommandError(str(error), ExitStatus.NOT_CHECKED) from error
    report = _Report(name, findings, time.perf_counter() - began)
    if as_json:
        report.print_json()
    else:
        report.print_table()
    return ExitStatus.OK if report.passed else ExitStatus.FAILED


@dataclasses.dataclass(frozen=True)
class _Report:
    server: str
    findings: Sequence[Finding]
    seconds: float

    @property
    def passed(self) -> bool:
        return all(finding.passed for finding in self.findings)

    def print_json(self) -> None:
        findings = [
            # JSON cannot represent NaN and Inf as numbers.
            dataclasses.asdict(f)
            | {
                "error": f.error if math.isfinite(f.error) else str(f.error),
                "passed": f.passed,
            }
            for f in self.findings
        ]
        json.dump(
            {
                "server": self.server,
                "passed": self.passed,
                "seconds": round(self.seconds, 3),
                "findings": findings,
            },
            sys.stdout,
        )
        sys.stdout.write("\n")

    def print_table(self) -> None:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for title in ("check", "dtype", "m x n x k", "result"):
            table.add_column(title, no_wrap=True)
        for title in ("error", "bound"):
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column("")
        for finding in _worst_of_each(self.findings):
            table.add_row(
                finding.check,
                finding.dtype,
                " x ".join(map(str, finding.shape or ())),
                finding.result,
                f"{finding.error:.2g}",
                f"{finding.bound:.2g}",
                _verdict(finding),
            )
        out = console()
        out.print(table)
        out.print(self._conclusion(), soft_wrap=True)

    def _conclusion(self) -> Text:
        wrong = [finding for finding in self.findings if not finding.passed]
        if not wrong:
            return Text(
                f"{self.server}: {len(self.findings)} checks passed "
                f"in {self.seconds:.1f} s"
            )
        names = ", ".join(
            f"{check} ({', '.join(dict.fromkeys(f.dtype for f in group))})"
            for check, group in groupby(wrong, key=lambda finding: finding.check)
        )
        notes = "".join(
            f"\n{note}" for note in dict.fromkeys(f.note for f in wrong) if note
        )
        return Text.assemble(
            (f"{self.server}: {len(wrong)} of {len(self.findings)} checks ", ""),
            ("failed", "bold red"),
            f": {names}{notes}",
        )


def _verdict(finding: Finding) -> Text:
    if finding.passed:
        return Text("ok", "green")
    return Text("ERROR" if finding.note else "WRONG", "bold red")


def _worst_of_each(findings: Iterable[Finding]) -> Iterable[Finding]:
    """The worst finding of each check and dtype, and every failed finding."""
    for _, group in groupby(findings, key=lambda f: (f.check, f.dtype)):
        same = list(group)
        wrong = [finding for finding in same if not finding.passed]
        yield from wrong or [max(same, key=_share_of_bound)]


def _share_of_bound(finding: Finding) -> float:
    return finding.error / finding.bound if finding.bound else 0.0
