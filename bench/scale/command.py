"""What a spread job would take, by servers and links: ``python -m bench.scale``.

Prints a table: seconds, how many times as fast as one server that the job is sent to
whole, and what bounds it. ``--record`` draws `FIGURE`. ``--check`` compares the model
with jobs on this host.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from bench.report import tables
from bench.scale.figures import DEVICES, Device
from bench.scale.model import Outcome, simulate
from bench.scale.setting import Plan, Setting
from bench.scale.workload import WHOLE, Workload
from bench.work import Shape

SERVERS = (1, 3, 10, 100, 1000)
GBITS = (10.0, 25.0, 100.0, 400.0)
SHAPES = (
    Shape(65536, 1024, 1024),
    Shape(131072, 2048, 2048),
    Shape(1 << 20, 512, 512),
    Shape(1 << 19, 8192, 8192),
)
FIGURE = Path("bench/results/scale.svg")
HEAD = ("shape", "device", "servers", "segments")
CHECK_HEAD = (
    "check",
    "servers",
    "seen s",
    "model s",
    "model/seen",
    "others' cores",
    "",
)

_THERE = Plan(rows="servers", w="server", segments_a_job=0)
WAYS = {
    "plain": Plan(),
    "single": Plan(segments_a_job=1),
    "runs": Plan(segments_a_job=4),
    "few uploads": Plan(segments_a_job=1, uploads=8),
    "runs, few uploads": Plan(segments_a_job=4, uploads=8),
    "there": _THERE,
    "there, W tree": replace(_THERE, w="tree"),
    "there, W tree, chain": replace(_THERE, w="tree", sums="chain"),
    "there, W tree, sum tree": replace(_THERE, w="tree", sums="tree"),
}
"""Named plans. "plain" is what the SDK does: a job a server, which takes segments one
by one. "single" has one segment in a job, "runs" has four, both two jobs a server;
"there" has rows on the servers, W sent to each once, and few jobs."""


def workload(shape: Shape, device: Device, *, ratio: int | None = None) -> Workload:
    """The job with the device's row blocks."""
    work = Workload(shape, device.row_block_bytes)
    return work if ratio is None else replace(work, ratio=ratio)


def long_enough(work: Workload, servers: int, segments_a_server: int = 4) -> Workload:
    """The job with so many rows that each server has so many segments, at least."""
    rows = segments_a_server * servers * work.block_rows * work.segment_blocks
    return replace(work, shape=replace(work.shape, m=max(work.shape.m, rows)))


@dataclass(frozen=True)
class Point:
    """One line of the table at one rate."""

    outcome: Outcome
    alone: Outcome
    """The same job on one server, not spread."""

    @property
    def gain(self) -> float:
        """How many times as fast as one server it is."""
        return self.alone.seconds / self.outcome.seconds

    @property
    def cell(self) -> str:
        """Seconds, gain, and what bounds the job."""
        busiest = next(iter(self.outcome.busy.values()))
        took = _seconds(self.outcome.seconds)
        return f"{took}  {self.gain:.1f}x  {self.outcome.bound} {busiest:.0%}"


Points: TypeAlias = dict[tuple[Shape, str, int, float], Point]
"""By shape, device, servers and Gbit/s."""


def points(options: argparse.Namespace) -> Points:
    """Simulate what was asked for."""
    found: Points = {}
    plan = WAYS[options.way]
    for shape, name, servers, gbits in itertools.product(
        options.shapes, options.devices, options.servers, options.gbits
    ):
        work = _work(shape, name, servers, options)
        # Others get no segment.
        busy = min(servers, work.segments)
        setting = Setting(busy, DEVICES[name], gbits, gbits, plan=plan)
        found[shape, name, servers, gbits] = Point(
            spread(work, setting), alone(work, setting)
        )
    return found


spread = functools.cache(simulate)


@functools.cache
def alone(work: Workload, setting: Setting) -> Outcome:
    """Simulate the job on one server, not spread, with its rows where they are."""
    plan = Plan(jobs_a_server=1, rows=setting.plan.rows)
    one = replace(setting, servers=1, plan=plan)
    return simulate(replace(work, ratio=WHOLE), one)


def _work(
    shape: Shape, device: str, servers: int, options: argparse.Namespace
) -> Workload:
    work = workload(shape, DEVICES[device], ratio=options.ratio)
    return long_enough(work, servers) if options.long else work


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.check:
        return _check(options.rounds)
    found = points(options)
    rows = []
    for shape, name, servers in dict.fromkeys(key[:3] for key in found):
        work = _work(shape, name, servers, options)
        cells = [found[shape, name, servers, gbits].cell for gbits in options.gbits]
        device = DEVICES[name].name
        rows.append(
            (work.shape.label, device, str(servers), str(work.segments), *cells)
        )
    head = (*HEAD, *(f"{gbits:g} Gbit/s" for gbits in options.gbits))
    print(tables.table(rows, head, texts=2))
    if options.record:
        from bench.scale.figure import draw  # noqa: PLC0415 - needs matplotlib

        draw(found, FIGURE)
        print(f"\nThe figure is {FIGURE}.", file=sys.stderr)
    return 0


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value >= 100 else f"{value:.3g} s"


def _check(rounds: int) -> int:
    from bench.scale import measure  # noqa: PLC0415 - starts servers

    print(f"load before: {os.getloadavg()[0]:.2f}")
    rows, good = [], True
    for seen in measure.measure(rounds=rounds):
        holds = abs(seen.ratio - 1) <= measure.TOLERANCE
        good &= holds
        rows.append(
            (
                seen.check.label,
                str(seen.servers),
                f"{seen.seconds:.2f}",
                f"{seen.predicted_s:.2f}",
                f"{seen.ratio:.2f}",
                f"{seen.others:.2f}",
                "holds" if holds else "FAILS",
            )
        )
    print(tables.table(rows, CHECK_HEAD, texts=1))
    return 0 if good else 1


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.scale",
        description="Simulates one job that is spread over many servers.",
    )
    parser.add_argument(
        "--servers",
        type=lambda text: [int(part) for part in text.split(",")],
        default=list(SERVERS),
        help="by commas",
    )
    parser.add_argument(
        "--gbits",
        type=_numbers,
        default=list(GBITS),
        help="of the client's card and of each server's link, by commas",
    )
    parser.add_argument(
        "--shapes",
        type=lambda text: [Shape.parse(part) for part in text.split(",")],
        default=list(SHAPES),
        help="by commas",
    )
    parser.add_argument(
        "--devices",
        type=lambda text: text.split(","),
        default=list(DEVICES),
        help=f"by commas ({','.join(DEVICES)})",
    )
    parser.add_argument(
        "--way",
        choices=WAYS,
        default="plain",
        help="where rows are, how W gets to the servers, and who adds sums (plain)",
    )
    parser.add_argument(
        "--long",
        action="store_true",
        help="with rows enough for four segments for each server",
    )
    parser.add_argument(
        "--ratio",
        type=int,
        help="bytes of a segment's operands over those of its sum (16)",
    )
    parser.add_argument(
        "--record", action="store_true", help=f"write the figure {FIGURE}"
    )
    parser.add_argument(
        "--check", action="store_true", help="compare with jobs on this host"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of each check (3)")
    return parser
