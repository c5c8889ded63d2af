"""Benchmarks of gradwire on a GPU host: ``python -m bench.gpu``.

There are five independent parts; a failing part does not affect the others:

a. **device**: the three products on the device alone, with the backend's code and
   with PyTorch (or CuPy, if PyTorch is missing), turn by turn.
b. **copies**: speed of the bus, in one direction and in both at once.
c. **worker**: jobs from host memory to host memory through a device worker, without
   gRPC, compared with the longest of upload, compute and download, each measured alone.
d. **transports**: complete jobs over TCP, a unix socket and shared memory, with the
   share of each stage, from the receipts.
e. **numpy**: the size from which the GPU is faster than the host's processor.

Needs CuPy, grpcio, protobuf, googleapis-common-protos, numpy and ml-dtypes, and the
sources (``PYTHONPATH=client:protos:server``). Writes a JSON file and prints a table.
With ``--backend numpy``, all parts except the first two run on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import machine
from bench.gpu import copies, device, device_worker, jobs
from bench.gpu.parts import Answer, Options
from bench.report import bound, tables
from bench.report.bound import Bound
from gradwire_server import Settings
from gradwire_server.backends import select

OUT = Path(__file__).parent / "out"

PARTS: dict[str, Callable[[Options], Answer]] = {
    "device": device.measure,
    "copies": copies.measure,
    "worker": device_worker.measure,
    "transports": jobs.measure_transports,
    "numpy": jobs.measure_sizes,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the selected parts; return 1 if one failed."""
    given = _parser().parse_args(arguments)
    when = datetime.now(UTC)
    path: Path = given.out or OUT / f"gpu-{when:%Y-%m-%dT%H%M%SZ}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    backend, why = select.choose(Settings(backend=given.backend))
    about = {
        "when": when.isoformat(timespec="seconds"),
        **machine.describe(os.cpu_count() or 1),
        "backend": f"{backend.name} ({why})",
        "devices": [asdict(each) for each in backend.devices],
        "libraries": backend.libraries(),
    }
    backend.close()
    print(_heading(about), flush=True)
    options = Options(backend=backend.name, quick=given.quick, scale=given.scale)
    answers: dict[str, Any] = {}
    bounds: list[Bound] = []
    for name in given.parts:
        began = time.perf_counter()
        answer = _answered(name, options)
        answers[name] = answer.as_json() | {"took_s": time.perf_counter() - began}
        bounds += answer.bounds(answers)
        print(f"\n{answer.table()}", flush=True)
        # Written after each part, so that a later failure loses nothing.
        found = {"about": about, "parts": answers, "bars": [asdict(b) for b in bounds]}
        path.write_text(json.dumps(found, indent=1) + "\n")
    if bounds:
        print(f"\n{bound.table(bounds)}")
    print(f"\nEverything is in {path}.", file=sys.stderr)
    return int(any("error" in answer for answer in answers.values()))


def _answered(name: str, options: Options) -> Answer:
    try:
        return PARTS[name](options)
    except Exception as error:  # noqa: BLE001 - run the other parts
        traceback.print_exc()
        return Answer(name, error=f"{type(error).__name__}: {error}")


def _heading(about: dict[str, Any]) -> str:
    devices = ", ".join(
        f"{d['name']} with {d['memory_bytes'] / 2**30:.0f} GiB"
        for d in about["devices"]
    )
    libraries = ", ".join(f"{k} {v}" for k, v in about["libraries"].items())
    return f"{about['backend']}: {devices}; {libraries}\n{tables.heading(about)}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description="Benchmarks of gradwire on a GPU host."
    )
    parser.add_argument("--backend", choices=("cupy", "numpy"), default="cupy")
    parser.add_argument(
        "--parts",
        type=_parts,
        default=list(PARTS),
        help=f"parts to run, by commas ({','.join(PARTS)})",
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer and shorter measurements"
    )
    parser.add_argument(
        "--scale",
        type=int,
        default=1,
        help="divisor of every size, for tests on small machines (1)",
    )
    parser.add_argument("--out", type=Path, help="file (bench/out/gpu-TIME.json)")
    return parser


def _parts(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        raise argparse.ArgumentTypeError(
            f"{', '.join(unknown)}: expected some of {', '.join(PARTS)}"
        )
    return names
