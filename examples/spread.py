"""One job on three servers, one of which is killed in the middle.

    .venv/bin/python examples/spread.py

The servers run on this machine, so they are no faster than one of them. What it shows
is that the job survives, with the same bits, and who has computed what.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from local_server import LocalServer, local_servers
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

import gradwire

M, N, K = 40_000, 192, 192
KILLED_AT = M // 3
"""Rows that are computed before a server is killed."""

RESULTS = ("y", "dx", "dw")


class Watch:
    """Shows the rows that each server has computed, and kills the first of them.

    Args:
        servers: The servers.
        shown: Shows the progress.
    """

    def __init__(self, servers: Sequence[LocalServer], shown: Progress) -> None:
        self.killed = ""
        self._first = servers[0]
        self._shown = shown
        self._whole = shown.add_task("all", total=M)
        self._tasks: dict[str, TaskID] = {
            each.address: shown.add_task(each.address, total=M) for each in servers
        }

    def __call__(self, progress: gradwire.Progress) -> None:
        """Take part in a job, as its `on_progress`."""
        rows = progress.rows_by_server or {}
        for address, task in self._tasks.items():
            self._shown.update(task, completed=rows.get(address, 0))
        self._shown.update(self._whole, completed=sum(rows.values()))
        if not self.killed and sum(rows.values()) >= KILLED_AT:
            self.killed = self._first.address
            os.kill(self._first.pid, signal.SIGKILL)
            self._shown.update(
                self._tasks[self.killed], description=f"{self.killed} (killed)"
            )


def segments_by_server(receipt: gradwire.Receipt) -> dict[str, list[int]]:
    """The numbers of the segments that each server has computed."""
    found: dict[str, list[int]] = {}
    for number, segment in enumerate(receipt.segments):
        found.setdefault(segment.server_address, []).append(number)
    return found


def table_of(receipt: gradwire.Receipt, names: Mapping[str, str]) -> Table:
    """Who has computed what."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("server")
    table.add_column("rows", justify="right")
    table.add_column("segments")
    by_server = segments_by_server(receipt)
    for address, name in names.items():
        numbers = by_server.get(address, [])
        rows = sum(receipt.segments[number].rows for number in numbers)
        table.add_row(name, f"{rows:,}", " ".join(map(str, numbers)))
    return table


def same_bits(one: Any, other: Any) -> bool:
    """Whether all results of two jobs have the same bits."""
    return all(
        getattr(one, name).tobytes() == getattr(other, name).tobytes()
        for name in RESULTS
    )


def main() -> int:
    """Compute a job on three servers, and again on one."""
    out = Console(highlight=False)
    rng = np.random.default_rng(1)
    x, w, dy = (
        rng.standard_normal(shape, dtype=np.float32)
        for shape in ((M, N), (N, K), (M, K))
    )
    # Jobs that were computed twice are cancelled, of which servers warn.
    with local_servers(3, "--row-block-bytes", "4MiB", log_level="error") as servers:
        addresses = [each.address for each in servers]
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f} rows"),
        )
        with (
            gradwire.connect(addresses) as client,
            Progress(*columns, console=out) as shown,
        ):
            watch = Watch(servers, shown)
            spread = client.gradients(x, w, dy, spread=True, on_progress=watch)
        with gradwire.connect(addresses[-1]) as client:
            alone = client.gradients(x, w, dy, spread=True)
    receipt = spread.receipt
    out.print(
        f"{len(receipt.segments)} segments of"
        f" {receipt.fingerprint.segment_rows:,} rows, in {receipt.jobs} jobs:"
    )
    killed = {watch.killed: f"{watch.killed} (killed)"}
    out.print(table_of(receipt, {each: killed.get(each, each) for each in addresses}))
    same = same_bits(spread, alone)
    out.print(f"the same bits as from one server: {same}")
    return 0 if same and watch.killed else 1


if __name__ == "__main__":
    sys.exit(main())
