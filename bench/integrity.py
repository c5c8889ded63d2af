"""The cost of checksums and verification: ``python -m bench.integrity``.

Runs the same call plain, with ``checksum=True`` and with ``verify=True``, turn by
turn over one connection to one server. Prints a line of JSON for each size: medians
in seconds, medians of the ratios to the plain call in the same turn, and the least
processor time of client and server together. The processor time is more reliable on
a busy machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import gradwire
from bench.contenders.gradwire_sdk import Gradwire
from bench.driver import SETTLE_S, rotated
from bench.work import Array, Shape, operands
from bench.worker import cpu_s

WAYS: Mapping[str, Mapping[str, bool]] = {
    "plain": {},
    "checksum": {"checksum": True},
    "verify": {"verify": True},
    "both": {"checksum": True, "verify": True},
}


def main() -> None:
    options = _parser().parse_args()
    server = Gradwire()
    try:
        server.start()
        with gradwire.connect(server.address, transport="grpc") as client:
            for text in options.shapes.split(","):
                shape = Shape.parse(text)
                pids = os.getpid(), server.server_pid
                found = measured(client, shape, options.rounds, pids)
                print(json.dumps(found), flush=True)
    finally:
        server.close()


def measured(
    client: gradwire.Client, shape: Shape, rounds: int, pids: Sequence[int]
) -> dict[str, Any]:
    """Measure the variants at one size, in these processes."""
    given = operands(shape)
    took: dict[str, list[float]] = {name: [] for name in WAYS}
    worked: dict[str, list[float]] = {name: [] for name in WAYS}
    verifying: list[float] = []
    for number in range(rounds + 1):
        for name in rotated(list(WAYS), number):
            time.sleep(SETTLE_S)  # the client uses BLAS to verify results
            before = sum(map(cpu_s, pids))
            seconds, receipt = _call(client, given, WAYS[name])
            cpu = sum(map(cpu_s, pids)) - before
            if not number:
                continue  # to warm up
            took[name].append(seconds)
            worked[name].append(cpu)
            if name == "verify":
                verifying.append(receipt.verifying_s)
    record: dict[str, Any] = {"shape": str(shape), "rounds": rounds}
    for name, seconds_each in took.items():
        pairs = zip(seconds_each, took["plain"], strict=True)
        record[name] = {
            "median_s": round(statistics.median(seconds_each), 4),
            "min_s": round(min(seconds_each), 4),
            "min_cpu_s": round(min(worked[name]), 3),
            "x_plain": round(statistics.median(one / plain for one, plain in pairs), 3),
        }
    record["verifying_s"] = round(statistics.median(verifying), 4)
    return record


def _call(
    client: gradwire.Client,
    given: tuple[Array, Array, Array],
    way: Mapping[str, bool],
) -> tuple[float, gradwire.Receipt]:
    begun = time.perf_counter()
    result = client.gradients(*given, **way)
    return time.perf_counter() - begun, result.receipt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.integrity",
        description="The cost of checksums and verification.",
    )
    parser.add_argument("--rounds", type=int, default=9, help="of each size (9)")
    parser.add_argument(
        "--shapes", default="1024,2048,16384x1024x1024", help="MxNxK, ..."
    )
    return parser


if __name__ == "__main__":
    main()
