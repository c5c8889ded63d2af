"""The command line of the bench: contenders, shapes, duration and output.

A run has whole jobs of several shapes, and transports alone: a shape at servers that
compute nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from bench import contenders, machine
from bench.driver import run_shape
from bench.report import bars, figure, summary, tables
from bench.report.record import Part, Run, Writer
from bench.report.statistics import figures
from bench.work import FORMS, Shape

SHAPES = ("32", "256", "1024", "2048", "4096", "16384x1024x1024", "1000000x64x64")
QUICK_SHAPES = ("256", "1024", "2048")
TRANSPORT_SHAPE = "16384x1024x1024"
TRANSPORT_FORM = "reused"
"""New results would be pages for the kernel to make, whatever the transport."""

OUT = Path(__file__).parent / "out"
RECORDED = Path(__file__).parent / "results" / "two-cores.jsonl"
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    when = datetime.now(UTC)
    path: Path = options.out or OUT / f"{when:%Y-%m-%dT%H%M%SZ}.jsonl"
    if options.record:
        path = RECORDED
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lines:
        writer = Writer(lines)
        where = machine.describe(options.threads)
        writer.about({"when": when.isoformat(timespec="seconds"), **where})
        print(tables.heading(where), flush=True)
        complete = options.transport_only or _whole_jobs(writer, options)
        if options.transport_only or not options.shapes:
            complete = _transports(writer, options) and complete
    run = Run.read(path)
    found = [v for v in bars.verdicts(run) if v.holds is not None]
    if found:
        print(f"\n{bars.table(found)}")
    if figure.cubes(run) and importlib.util.find_spec("matplotlib"):
        figure.draw(run, path.with_suffix(".svg"))
        print(f"\nFigure: {path.with_suffix('.svg')}", file=sys.stderr)
    if options.record:
        summary.write_page(run, PAGE)
    print(f"\nEvery call is in {path}.", file=sys.stderr)
    return 0 if complete else 1


def _whole_jobs(writer: Writer, options: argparse.Namespace) -> bool:
    """Time calls with their products; return whether all could be."""
    by_address = [f"oip@{where}" for where in options.oip]
    names = installed([*(options.contenders or contenders.WHOLE_JOBS), *by_address])
    shapes = options.shapes or [
        Shape.parse(text) for text in (QUICK_SHAPES if options.quick else SHAPES)
    ]
    complete = True
    for form in options.forms:
        parts = [_part(writer, names, shape, form, options) for shape in shapes]
        body = [row for part in parts if part for row in tables.rows(part)]
        print(f"\nResults in {form} arrays:\n\n{tables.table(body)}", flush=True)
        complete = complete and None not in parts
    return complete


def _transports(writer: Writer, options: argparse.Namespace) -> bool:
    """Time calls without products; return whether all could be."""
    names = installed(options.contenders or contenders.TRANSPORTS)
    names = [name for name in names if name != "numpy"]
    if not names:
        return True
    complete = True
    for shape in options.shapes or [Shape.parse(TRANSPORT_SHAPE)]:
        part = _part(writer, names, shape, TRANSPORT_FORM, options, products=False)
        if part is None:
            complete = False
        else:
            body = tables.transport_rows(part)
            table = tables.table(body, tables.TRANSPORT_HEAD, texts=1)
            print(f"\n{shape.label}, without products:\n\n{table}", flush=True)
    return complete


def _part(
    writer: Writer,
    names: Sequence[str],
    shape: Shape,
    form: str,
    options: argparse.Namespace,
    *,
    products: bool = True,
) -> Part | None:
    """One shape in one form; None, and a line that says why, if it failed."""
    what = f"{shape}, {form}" if products else f"{shape}, without products"
    print(f"{what} ...", file=sys.stderr, flush=True)
    seconds, least_rounds = (8, 2) if options.quick else (options.seconds, 3)
    try:
        turns, usages = run_shape(
            names,
            shape,
            form=form,
            threads=options.threads,
            rounds=options.rounds,
            seconds=seconds,
            least_rounds=least_rounds,
            products=products,
        )
    except RuntimeError as error:
        # The other shapes are independent of this one.
        print(f"{what}: {error}", file=sys.stderr)
        return None
    seen = tuple(figures(turns, names[0]))
    part = Part(shape, form, seen, tuple(usages), products=products)
    writer.part(part, turns)
    return part


def installed(names: Sequence[str]) -> list[str]:
    """The contenders with installed packages; reports the others."""
    found = []
    for name in names:
        if package := contenders.missing(name):
            print(f"{name} is left out: {package} is not installed", file=sys.stderr)
        else:
            found.append(name)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Seconds of the three gradients, contenders taking turns.",
    )
    parser.add_argument(
        "--shapes",
        type=lambda text: [Shape.parse(part) for part in text.split(",")],
        help=f"MxNxK or one number for a cube, by commas ({','.join(SHAPES)})",
    )
    parser.add_argument(
        "--forms",
        type=lambda text: _known(text, FORMS),
        default=list(FORMS),
        help=f"where results go, by commas ({','.join(FORMS)})",
    )
    parser.add_argument(
        "--contenders",
        type=lambda text: _known(text, contenders.NAMES),
        help="by commas; the first is the yardstick "
        f"({','.join(contenders.WHOLE_JOBS)}; "
        f"without products: {','.join(contenders.TRANSPORTS)})",
    )
    parser.add_argument(
        "--oip",
        metavar="HOST:PORT[/MODEL]",
        action="append",
        default=[],
        help="a server with the Open Inference Protocol and a model "
        "gradients of inputs X, W, DY and outputs Y, DX, DW",
    )
    parser.add_argument(
        "--transport-only",
        action="store_true",
        help="only at servers that compute nothing: GB/s each way "
        f"({TRANSPORT_SHAPE}, or what --shapes says)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"a few rounds of {','.join(QUICK_SHAPES)}: for a first impression",
    )
    parser.add_argument(
        "--seconds", type=float, default=35, help="for each shape and form, about (35)"
    )
    parser.add_argument("--rounds", type=int, default=40, help="at most (40)")
    parser.add_argument(
        "--threads",
        type=int,
        default=os.cpu_count() or 1,
        help="threads that compute, in every process (as many as cores)",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--out", type=Path, help="file of JSON lines (bench/out/TIME.jsonl)"
    )
    where.add_argument(
        "--record",
        action="store_true",
        help="make bench/results/two-cores.jsonl, its figure, and the table of "
        "docs/benchmarks.md anew; on an idle machine with two cores",
    )
    return parser


def _known(text: str, known: Sequence[str]) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(known)}")
    return names
