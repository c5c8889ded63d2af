"""A server's load as a table for a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gradwire_cli.load.server_load import DeviceLoad, Memory, ServerLoad, TenantLoad
from gradwire_cli.terminal.units import format_bytes, format_seconds

_BAR_COLUMNS = 20


def server_table(load: ServerLoad) -> RenderableType:
    """Return the table of a server."""
    state = Text(" draining", style="bold yellow") if load.draining else Text()
    title = Text.assemble(
        (load.url, "bold"), f"  gradwire {load.version}, {load.backend}", state
    )
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="bold", no_wrap=True)
    rows.add_column(width=_BAR_COLUMNS)
    rows.add_column(overflow="fold")
    jobs = load.jobs
    rows.add_row(
        "jobs",
        _bar(jobs.running, jobs.running_limit),
        f"{jobs.running} of {jobs.running_limit} running, {jobs.ended_per_s:.3g}/s"
        f" ended{_mean(jobs.mean_duration_s)}, {jobs.failed_per_s:.3g}/s failed",
    )
    rows.add_row(
        "queue",
        _bar(jobs.queued, jobs.queued_limit),
        f"{jobs.queued} of {jobs.queued_limit} wait, the oldest for"
        f" {format_seconds(jobs.oldest_wait_s) if jobs.queued else '0 s'}",
    )
    rows.add_row(
        "elements",
        "",
        f"{_rate(load.received_per_s)} in, {_rate(load.sent_per_s)} out,"
        f" {_flop(load.flop_per_s)}",
    )
    rows.add_row("memory", *_memory(load.memory))
    sessions = load.sessions
    rows.add_row(
        "sessions",
        _bar(sessions.reserved, sessions.limit),
        f"{sessions.open} open, {format_bytes(sessions.reserved)} of"
        f" {format_bytes(sessions.limit)} reserved,"
        f" {format_bytes(sessions.used)} used",
    )
    for device in load.devices:
        _add_device(rows, device)
    parts: list[RenderableType] = [title, rows]
    if load.tenants:
        parts.append(_tenants(load.tenants))
    return Group(*parts)


def failure_line(url: str, error: Exception) -> RenderableType:
    """Return what stands in place of the table of a server that does not answer."""
    return Text.assemble((url, "bold"), ("  " + str(error), "red"))


def _add_device(rows: Table, device: DeviceLoad) -> None:
    rows.add_row(
        f"device {device.index}",
        _bar(device.busy, 1.0),
        f"{device.busy:.0%} busy, running jobs: {device.running_jobs},"
        f" {device.row_blocks_per_s:.3g} row blocks/s, {_flop(device.flop_per_s)};"
        f" {device.name}",
    )
    if device.memory is not None:
        rows.add_row("  its memory", *_memory(device.memory))


def _tenants(tenants: Iterable[TenantLoad]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("tenant")
    for name in ("running", "waiting", "memory", "in", "out"):
        table.add_column(name, justify="right")
    for each in sorted(tenants, key=lambda each: (-each.running, each.tenant)):
        table.add_row(
            Text(each.tenant or "(none)"),
            str(each.running),
            str(each.queued),
            format_bytes(each.held),
            _rate(each.received_per_s),
            _rate(each.sent_per_s),
        )
    return table


def _memory(memory: Memory) -> tuple[RenderableType, str]:
    text = f"{format_bytes(memory.held)} of {format_bytes(memory.limit)} held"
    return _bar(memory.held, memory.limit), text


def _bar(part: float, whole: float) -> ProgressBar:
    return ProgressBar(total=max(whole, 1e-9), completed=part, width=_BAR_COLUMNS)


def _mean(seconds: float | None) -> str:
    return "" if seconds is None else f" in {format_seconds(seconds)} each"


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.3f} GB/s"


def _flop(flop_per_s: float) -> str:
    return f"{flop_per_s / 1e12:.3f} TFLOP/s"
