"""The command: which contenders, which shapes, how long, and where it goes."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from bench import contenders, machine, report
from bench.driver import Peak, Turn, run_shape
from bench.statistics import Figure, figures
from bench.work import Shape

SHAPES = ("256", "1024", "2048", "16384x1024x1024")
OUT = Path(__file__).parent / "out"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    when = datetime.now(UTC)
    path: Path = options.out or OUT / f"{when:%Y-%m-%dT%H%M%SZ}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    body: list[tuple[str, ...]] = []
    with path.open("w") as lines:
        where = machine.describe(options.threads)
        _write(lines, "run", {"when": when.isoformat(timespec="seconds"), **where})
        print(report.heading(where), end="\n\n", flush=True)
        for shape in options.shapes:
            print(f"{shape} ...", file=sys.stderr, flush=True)
            turns, peaks = run_shape(
                options.contenders,
                shape,
                threads=options.threads,
                rounds=options.rounds,
                seconds=options.seconds,
            )
            summary = figures(turns, yardstick=options.contenders[0])
            _record(lines, shape, turns, peaks, summary)
            body += report.rows(shape, summary, peaks)
    print(report.table(body))
    print(f"\nEvery call is in {path}.", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Seconds of the three gradients, contenders taking turns.",
    )
    parser.add_argument(
        "--shapes",
        type=lambda text: [Shape.parse(part) for part in text.split(",")],
        default=[Shape.parse(text) for text in SHAPES],
        help=f"MxNxK or one number for a cube, by commas ({','.join(SHAPES)})",
    )
    parser.add_argument(
        "--contenders",
        type=_names,
        default=list(contenders.NAMES),
        help="by commas; the first is the yardstick "
        f"(all: {','.join(contenders.NAMES)})",
    )
    parser.add_argument(
        "--seconds", type=float, default=50, help="about so long a shape (50)"
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


def _names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in contenders.NAMES:
            raise argparse.ArgumentTypeError(
                f"{name} is none of {', '.join(contenders.NAMES)}"
            )
    return names


def _record(
    lines: IO[str],
    shape: Shape,
    turns: list[Turn],
    peaks: list[Peak],
    summary: list[Figure],
) -> None:
    for kind, items in (("turn", turns), ("peak", peaks), ("figure", summary)):
        for item in items:
            _write(lines, kind, {"shape": str(shape), **asdict(item)})


def _write(lines: IO[str], kind: str, fields: dict[str, Any]) -> None:
    lines.write(json.dumps({"kind": kind, **fields}) + "\n")
    lines.flush()
