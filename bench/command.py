"""The command line of the bench: contenders, shapes, duration and output."""

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
from bench.report import bars, figure, tables
from bench.report.record import Part, Run, Writer
from bench.report.statistics import figures
from bench.work import FORMS, Shape

SHAPES = ("256", "1024", "2048", "4096", "16384x1024x1024", "1000000x64x64")
QUICK_SHAPES = ("256", "1024", "2048")
# Products with vectors: little arithmetic, and equal bytes each way.
TRANSPORT_SHAPES = ("1024x256x1", "16384x1024x1", "65536x1024x1")
OUT = Path(__file__).parent / "out"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    when = datetime.now(UTC)
    path: Path = options.out or OUT / f"{when:%Y-%m-%dT%H%M%SZ}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    names = installed(options.contenders + [f"oip@{where}" for where in options.oip])
    with path.open("w") as lines:
        writer = Writer(lines)
        where = machine.describe(options.threads)
        writer.about({"when": when.isoformat(timespec="seconds"), **where})
        print(tables.heading(where), flush=True)
        complete = True
        for form in options.forms:
            body: list[tuple[str, ...]] = []
            for shape in _shapes(options):
                try:
                    body += tables.rows(_part(writer, names, shape, form, options))
                except RuntimeError as error:
                    # The other shapes are independent of this one.
                    print(f"{shape}, {form}: {error}", file=sys.stderr)
                    complete = False
            print(f"\nResults in {form} arrays:\n\n{tables.table(body)}", flush=True)
    run = Run.read(path)
    found = [v for v in bars.verdicts(run) if v.holds is not None]
    if found:
        print(f"\n{bars.table(found)}")
    if figure.cubes(run) and importlib.util.find_spec("matplotlib"):
        figure.draw(run, path.with_suffix(".svg"))
        print(f"\nFigure: {path.with_suffix('.svg')}", file=sys.stderr)
    print(f"\nEvery call is in {path}.", file=sys.stderr)
    return 0 if complete else 1


def _part(
    writer: Writer,
    names: Sequence[str],
    shape: Shape,
    form: str,
    options: argparse.Namespace,
) -> Part:
    print(f"{shape}, {form} ...", file=sys.stderr, flush=True)
    seconds, least_rounds = (8, 2) if options.quick else (options.seconds, 3)
    turns, usages = run_shape(
        names,
        shape,
        form=form,
        threads=options.threads,
        rounds=options.rounds,
        seconds=seconds,
        least_rounds=least_rounds,
    )
    part = Part(shape, form, tuple(figures(turns, names[0])), tuple(usages))
    writer.part(part, turns)
    return part


def _shapes(options: argparse.Namespace) -> list[Shape]:
    if options.shapes:
        return list(options.shapes)
    if options.transport_only:
        texts: tuple[str, ...] = TRANSPORT_SHAPES
    else:
        texts = QUICK_SHAPES if options.quick else SHAPES
    return [Shape.parse(text) for text in texts]


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
        default=list(contenders.NAMES),
        help="by commas; the first is the yardstick "
        f"(all: {','.join(contenders.NAMES)})",
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
        help="shapes with next to no arithmetic: GB/s each way "
        f"({','.join(TRANSPORT_SHAPES)})",
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
    parser.add_argument(
        "--out", type=Path, help="file of JSON lines (bench/out/TIME.jsonl)"
    )
    return parser


def _known(text: str, known: Sequence[str]) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(known)}")
    return names
