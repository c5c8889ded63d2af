"""The bench over links of 1 and 10 Gbit/s: ``python -m bench.links``.

Client and server run in separate network namespaces (`bench.links.namespaces`).

The shapes of the first two links balance computation on two cores with each direction
of the link. A transport with overlap then takes as long as its longest stage; a
transport without overlap takes as long as all three.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from bench import command, contenders, machine
from bench.driver import run_shape
from bench.links.namespaces import LinkError, link
from bench.report import bars, tables
from bench.report.record import Part, Run, Writer
from bench.report.statistics import figures
from bench.work import FORMS, Shape

CONTENDERS = (
    "numpy",
    "gradwire-grpc",
    "gradwire-direct",
    "grpcio-stream",
    "arrow-flight",
    "torch-rpc",
    "raw-tcp",
)
_TALL = Shape(16384, 1024, 1024)


@dataclass(frozen=True, slots=True)
class Link:
    """A link, and what is sent over it."""

    gbits: float
    shape: Shape
    round_trip_ms: float = 0.0
    products: bool = True
    """Whether servers compute."""

    @property
    def label(self) -> str:
        """The link for people."""
        delay = f", {self.round_trip_ms:g} ms" if self.round_trip_ms else ""
        return f"{self.gbits:g} Gbit/s{delay}"


LINKS = (
    Link(1, Shape(32768, 2048, 2048)),
    Link(10, Shape(262144, 256, 256)),
    Link(1, _TALL, round_trip_ms=20),
    Link(10, _TALL, products=False),
)
QUICK_SHAPE = Shape(4096, 512, 256)
"""Large enough for direct connections, and takes little time at any of the rates."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    # Terminated, the bench still removes its link.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    when = datetime.now(UTC)
    path: Path = options.out or command.OUT / f"{when:%Y-%m-%dT%H%M%SZ}-links.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    names = command.installed(options.contenders)
    about = machine.describe(os.cpu_count() or 1)
    with path.open("w") as lines:
        writer = Writer(lines)
        writer.about({"when": when.isoformat(timespec="seconds"), **about})
        print(tables.heading(about), flush=True)
        for each in _links(options):
            try:
                part = _part(writer, names, each, options)
            except (LinkError, RuntimeError) as error:
                print(f"{each.label}: {error}", file=sys.stderr)
                return 1
            _print(part, each.label)
    found = [v for v in bars.verdicts(Run.read(path)) if v.holds is not None]
    if found and not options.quick:
        print(f"\n{bars.table(found)}")
    print(f"\nEvery call is in {path}.", file=sys.stderr)
    return 0


def _links(options: argparse.Namespace) -> list[Link]:
    """The links that were asked for, or all of `LINKS`."""
    shape = options.shape or (QUICK_SHAPE if options.quick else None)
    if options.gbits or options.round_trip_ms or options.transport_only:
        alone, trip_ms = options.transport_only, options.round_trip_ms
        balanced = (
            {} if alone or trip_ms else {one.gbits: one.shape for one in LINKS[:2]}
        )
        links = [
            Link(gbits, balanced.get(gbits, _TALL), trip_ms, products=not alone)
            for gbits in options.gbits or (1.0, 10.0)
        ]
    else:
        links = list(LINKS)
    return [dataclasses.replace(one, shape=shape or one.shape) for one in links]


def _part(
    writer: Writer, names: Sequence[str], over: Link, options: argparse.Namespace
) -> Part:
    if not over.products:
        names = [name for name in names if name in contenders.TRANSPORTS]
    what = "" if over.products else ", without products"
    print(f"{over.shape} at {over.label}{what} ...", file=sys.stderr, flush=True)
    rate, round_trip_s = over.gbits * 1e9, over.round_trip_ms / 1000
    with link(rate, round_trip_s) as before:
        turns, usages = run_shape(
            names,
            over.shape,
            form=options.form,
            threads=os.cpu_count() or 1,
            rounds=1 if options.quick else options.rounds,
            seconds=options.seconds,
            before=before,
            products=over.products,
        )
    seen = tuple(figures(turns, names[0]))
    part = Part(
        over.shape,
        options.form,
        seen,
        tuple(usages),
        rate,
        round_trip_s,
        products=over.products,
    )
    writer.part(part, turns)
    return part


def _print(part: Part, label: str) -> None:
    if part.products:
        body = [(label, *row) for row in tables.rows(part)]
        table = tables.table(body, ("link", *tables.HEAD), texts=3)
    else:
        rows = tables.transport_rows(part)
        label += f", {part.shape.label} without products"
        body = [(label, *row) for row in rows]
        table = tables.table(body, ("link", *tables.TRANSPORT_HEAD), texts=2)
    print(f"\n{table}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.links",
        description="The bench over limited links, between network namespaces. "
        "Without an option that names links: 1 and 10 Gbit/s, 1 Gbit/s with 20 ms of "
        "round trip, and 10 Gbit/s to servers that compute nothing.",
    )
    parser.add_argument(
        "--gbits",
        type=lambda text: [float(part) for part in text.split(",")],
        help="Gbit/s each way, by commas (1,10)",
    )
    parser.add_argument(
        "--round-trip-ms", type=float, default=0, help="round-trip time of the link (0)"
    )
    parser.add_argument(
        "--transport-only", action="store_true", help="at servers that compute nothing"
    )
    parser.add_argument("--shape", type=Shape.parse, help="instead of the link's own")
    parser.add_argument(
        "--contenders",
        type=lambda text: text.split(","),
        default=list(CONTENDERS),
        help=f"by commas, numpy first ({','.join(CONTENDERS)})",
    )
    parser.add_argument("--form", choices=FORMS, default="fresh")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"a call of {QUICK_SHAPE} each: whether it works, not how fast",
    )
    parser.add_argument(
        "--seconds", type=float, default=90, help="for each link, about (90)"
    )
    parser.add_argument("--rounds", type=int, default=10, help="at most (10)")
    parser.add_argument("--out", type=Path, help="file of JSON lines")
    return parser
