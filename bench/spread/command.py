"""The command line of the bench of spread jobs."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import machine
from bench.report import bound, tables
from bench.report.bound import Bound
from bench.spread import report

OUT = Path(__file__).parents[1] / "out"
PARTS = tuple(report.TABLES)
NARROW, WIDE = "131072x1008x16", "65536x1024x1024"
BYTES_SHAPES = (
    "1048576x64x64",
    "262144x256x256",
    "131072x512x512",
    "65536x1024x1024",
    "65536x2048x2048",
)
BLOCK_MS = 200.0
"""What a row block of `NARROW` takes on a slow device: 32 of them take it much longer
than two cores need to move them."""
FAILING = {"shape": "524288x64x64", "block_ms": 80.0}
"""64 row blocks, each a segment."""
QUICK = {
    "cpu": [("8192x64x64", "idle")],
    "bytes": ["8192x64x64"],
    "memory": "8192x64x64",
    "devices": ("98304x16x16", 5.0),
    "failing": ("98304x64x64", 20.0),
    "stream": "20000x64x64",
}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.read:
        about, *lines = map(json.loads, options.read.read_text().splitlines())
        print(tables.heading(about))
        _print_bounds(_print_parts(lines))
        return 0
    # Terminated, the bench still ends its worker.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    when = datetime.now(UTC)
    path: Path = options.out or OUT / f"{when:%Y-%m-%dT%H%M%SZ}-spread.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    about = machine.describe(os.cpu_count() or 1)
    bounds: list[Bound] = []
    with path.open("w") as out:
        first = {"kind": "run", "when": when.isoformat(timespec="seconds"), **about}
        out.write(json.dumps(first) + "\n")
        print(tables.heading(about), flush=True)
        for number, group in enumerate(groups(options)):
            lines: list[dict[str, Any]] = []
            for asked in group:
                of = {name: asked[name] for name in _NAMES if name in asked}
                try:
                    for line in _measured(asked):
                        lines.append({"group": number, **of, **line})
                        out.write(json.dumps(lines[-1]) + "\n")
                        out.flush()
                except RuntimeError as error:
                    print(error, file=sys.stderr)
                    return 1
            bounds += _print_parts(lines)
    _print_bounds(bounds)
    print(f"\nEvery call is in {path}.", file=sys.stderr)
    return 0


_NAMES = ("part", "shape", "servers", "transport", "block_ms")
"""What is asked, and describes the figures."""


def groups(options: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """What each worker is asked to measure; a group has a table."""
    quick = options.quick
    common = {
        "transport": options.transport,
        "rounds": 1 if quick else options.rounds,
        "least_rounds": 1 if quick else 2,
        "seconds": options.seconds,
    }
    for part in options.parts:
        asked = {"part": part, **common}
        if part == "cpu":
            shapes = [(s, at) for s in (NARROW, WIDE) for at in ("idle", "numpy")]
            for shape, at in QUICK["cpu"] if quick else shapes:
                yield [{**asked, "shape": shape, "servers": at}]
        elif part == "bytes":
            of = {"shapes": QUICK["bytes"] if quick else BYTES_SHAPES}
            yield [{**asked, **of, "counts": [1] if quick else [1, 3]}]
        elif part == "devices":
            shape, ms = QUICK["devices"] if quick else (NARROW, BLOCK_MS)
            yield [{**asked, "shape": shape, "block_ms": ms}]
        elif part == "failing":
            shape, ms = QUICK["failing"] if quick else FAILING.values()
            ways = list(report.MOST_LATE)
            of = {"shape": shape, "block_ms": ms, "ways": ways, "tolerance": 1e-4}
            yield [{**asked, **of}]
        elif part == "memory":
            shape = QUICK["memory"] if quick else "131072x1024x1024"
            counts = (0, 1) if quick else (0, 1, 2, 3)
            yield [{**asked, "shape": shape, "count": each} for each in counts]
        elif part == "stream":
            shape = QUICK["stream"] if quick else NARROW
            of = {"item_rows": 1024, "calls": 1 if quick else 2}
            of["seconds"] = options.seconds / 3
            for at in ("idle",) if quick else ("idle", "numpy"):
                yield [{**asked, "shape": shape, "servers": at, **of}]


def _print_parts(lines: Iterable[dict[str, Any]]) -> list[Bound]:
    """Print a table for each group of lines; return the bars' figures."""
    found: dict[int, list[dict[str, Any]]] = {}
    for line in lines:
        found.setdefault(line["group"], []).append(line)
    bounds: list[Bound] = []
    for group in found.values():
        first = group[0]
        title = [first["part"]]
        if first["part"] != "bytes":
            title.append(first["shape"])
        if isinstance(first.get("servers"), str):
            title.append(f"servers {first['servers']}")
        if "block_ms" in first:
            title.append(f"{first['block_ms']:g} ms a row block")
        title.append(f"transport {first['transport']}")
        title.append(f"load {report.loads(group)}")
        table = report.TABLES[first["part"]](group)
        print(f"\n{', '.join(title)}:\n\n{table}", flush=True)
        bounds += report.BOUNDS[first["part"]](group)
    return bounds


def _print_bounds(bounds: list[Bound]) -> None:
    if bounds:
        print(f"\n{bound.table(bounds)}")


def _measured(asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Run one worker, and yield its lines as they come.

    Raises:
        RuntimeError: The worker failed.
    """
    # gRPC logs every connection closed by a stopping server.
    environment = {"GRPC_VERBOSITY": "ERROR"} | os.environ
    command = [sys.executable, "-m", "bench.spread.worker", json.dumps(asked)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            for text in process.stdout:
                yield json.loads(text)
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        raise RuntimeError(
            f"the worker of {asked['part']} ended with status {process.returncode}"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.spread",
        description="Jobs that are spread over one to three servers: processor time,"
        " bytes and memory; seconds at slow devices, and if a server is killed or"
        " stopped; the first block of a stream. 8 minutes on two cores.",
    )
    parser.add_argument(
        "--parts", type=_parts, default=PARTS, help=f"by commas ({','.join(PARTS)})"
    )
    parser.add_argument(
        "--transport", default="auto", help="the client's: grpc, direct (auto)"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one small round of each: whether it works, not how well",
    )
    parser.add_argument(
        "--seconds", type=float, default=45, help="of the turns of a table, about (45)"
    )
    parser.add_argument("--rounds", type=int, default=6, help="at most (6)")
    parser.add_argument("--out", type=Path, help="file of JSON lines")
    parser.add_argument(
        "--read",
        type=Path,
        help="print the figures of such a file, and measure nothing",
    )
    return parser


def _parts(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in PARTS:
            raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(PARTS)}")
    return names
