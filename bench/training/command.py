"""The command line of the bench of training."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import machine
from bench.links.namespaces import LinkError, link
from bench.report import bound, tables
from bench.report.bound import Bound
from bench.training import report
from bench.training.sizes import SIZES
from bench.training.worker import CONTENDERS

OUT = Path(__file__).parents[1] / "out"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.read:
        about, *lines = map(json.loads, options.read.read_text().splitlines())
        print(tables.heading(about))
        _print_bounds(_print_parts(lines))
        return 0
    # Terminated, the bench still removes its link.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    when = datetime.now(UTC)
    path: Path = options.out or OUT / f"{when:%Y-%m-%dT%H%M%SZ}-training.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    about = machine.describe(os.cpu_count() or 1)
    bounds: list[Bound] = []
    with path.open("w") as out:
        first = {"kind": "run", "when": when.isoformat(timespec="seconds"), **about}
        out.write(json.dumps(first) + "\n")
        print(tables.heading(about), flush=True)
        for gbits in options.gbits:
            for size in options.sizes:
                try:
                    lines = _measured(size, gbits, options, out)
                except (LinkError, RuntimeError) as error:
                    print(error, file=sys.stderr)
                    return 1
                bounds += _print_parts(lines)
    _print_bounds(bounds)
    print(f"\nEvery step is in {path}.", file=sys.stderr)
    return 0


def _print_parts(lines: Iterable[dict[str, Any]]) -> list[Bound]:
    """Print a table for each size and link; return the bars' figures."""
    parts: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for line in lines:
        parts.setdefault((line["size"], line["gbits"]), []).append(line)
    bounds: list[Bound] = []
    for (size, gbits), part in parts.items():
        where = f"{gbits:g} Gbit/s" if gbits else "loopback"
        of = SIZES[size]
        what = f"{size}: d = {of.d}, blocks: {of.blocks}, {of.rows} rows; {where}"
        print(f"\n{what}:\n\n{report.table(part)}", flush=True)
        bounds += report.bounds(part)
    return bounds


def _print_bounds(bounds: list[Bound]) -> None:
    if bounds:
        print(f"\n{bound.table(bounds)}")


def _measured(
    size: str, gbits: float, options: argparse.Namespace, out: Any
) -> list[dict[str, Any]]:
    """Run one worker; return its lines, which are written to `out` as they come."""
    asked = {
        "size": size,
        "contenders": options.contenders,
        "check": not gbits,
        "count": not gbits,
        "rounds": options.rounds,
        "least_rounds": options.least_rounds,
        "seconds": options.seconds,
    }
    lines = []
    # gRPC logs every connection closed by a stopping server.
    environment = {"GRPC_VERBOSITY": "ERROR"} | os.environ
    with contextlib.ExitStack() as stack:
        before: list[str] = []
        if gbits:
            before = stack.enter_context(link(gbits * 1e9, options.round_trip_ms / 1e3))
        command = [*before, sys.executable, "-m", "bench.training.worker"]
        process = stack.enter_context(
            subprocess.Popen(
                [*command, json.dumps(asked)],
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
        )
        try:
            assert process.stdout is not None
            for text in process.stdout:
                line = {"size": size, "gbits": gbits, **json.loads(text)}
                lines.append(line)
                out.write(json.dumps(line) + "\n")
                out.flush()
        finally:
            process.terminate()
        if process.wait():
            raise RuntimeError(f"the worker ended with status {process.returncode}")
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.training",
        description="A step of the linear layers of a GPT: bytes and milliseconds of"
        " local NumPy, of gradwire with W sent in every call, and of a session.",
    )
    parser.add_argument(
        "--sizes",
        type=lambda text: _known(text, SIZES),
        default=["a", "b"],
        help="by commas (a,b)",
    )
    parser.add_argument(
        "--gbits",
        type=lambda text: [float(part) for part in text.split(",")],
        default=[0.0],
        help="Gbit/s of the link each way, by commas; 0: loopback, where bytes are"
        " counted; others need root and iproute2 (0)",
    )
    parser.add_argument(
        "--round-trip-ms", type=float, default=0, help="round-trip time of the link (0)"
    )
    parser.add_argument(
        "--contenders",
        type=lambda text: _known(text, CONTENDERS),
        default=list(CONTENDERS),
        help=f"by commas ({','.join(CONTENDERS)})",
    )
    parser.add_argument(
        "--seconds", type=float, default=90, help="for each size and link, about (90)"
    )
    parser.add_argument("--rounds", type=int, default=20, help="at most (20)")
    parser.add_argument("--least-rounds", type=int, default=3, help="at least (3)")
    parser.add_argument("--out", type=Path, help="file of JSON lines")
    parser.add_argument(
        "--read",
        type=Path,
        help="print the figures of such a file, and measure nothing",
    )
    return parser


def _known(text: str, known: Any) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(known)}")
    return names
