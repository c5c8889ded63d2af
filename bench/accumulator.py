"""The cost of a float64 accumulator: ``python -m bench.accumulator``.

Runs the same call with ``dw_accumulator="float32"`` and with ``"float64"``, turn by
turn over one connection to one server. Prints a line of JSON for each shape and dtype:
medians in seconds of the call and of the server's products and sums, the medians of
their ratios in the same turn, and the server's memory for the job. With ``--address``
the server is one that runs already, for example on a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import gradwire
from bench.contenders.gradwire_sdk import Gradwire
from bench.driver import SETTLE_S, rotated
from bench.work import Array, Shape, operands
from gradwire_protocol.dtypes import Dtype

ACCUMULATORS = ("float32", "float64")
SHAPES = "256,1024,2048,16384x1024x1024,2000000x16x16"
DTYPES = "float32,bfloat16,float16"


def main() -> None:
    options = _parser().parse_args()
    if options.address:
        _measure_at(options.address, options)
        return
    server = Gradwire(shared=options.transport == "shm")
    try:
        server.start()
        _measure_at(server.address, options)
    finally:
        server.close()


def measured(
    client: gradwire.Client,
    given: Sequence[Array],
    rounds: int,
    call: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure both accumulators with the same operands."""
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in ACCUMULATORS}
    reserved: dict[str, int] = {}
    for number in range(rounds + 1):
        for name in rotated(list(ACCUMULATORS), number):
            time.sleep(SETTLE_S)
            begun = time.perf_counter()
            receipt = client.gradients(
                *given, dw_accumulator=name, **(call or {})
            ).receipt
            seconds = time.perf_counter() - begun
            reserved[name] = receipt.reserved_bytes + receipt.device_bytes
            if number:  # the first round is to warm up
                took[name].append((seconds, receipt.computing_s))
    record: dict[str, Any] = {"rounds": rounds, "blocks": receipt.blocks}
    for name, pairs in took.items():
        record[name] = {
            "median_s": round(statistics.median(each[0] for each in pairs), 5),
            "computing_s": round(statistics.median(each[1] for each in pairs), 5),
            "reserved_mib": round(reserved[name] / 2**20, 1),
        }
    for position, what in enumerate(("ratio", "computing_ratio")):
        both = zip(took["float64"], took["float32"], strict=True)
        ratios = [wide[position] / narrow[position] for wide, narrow in both]
        record[what] = round(statistics.median(ratios), 3)
    return record


def _measure_at(address: str, options: argparse.Namespace) -> None:
    call = {"results": options.results.split(",")}
    with gradwire.connect(address, transport=options.transport) as client:
        for text in options.shapes.split(","):
            for label in options.dtypes.split(","):
                shape, dtype = Shape.parse(text), Dtype.named(label)
                given = [each.astype(dtype.numpy) for each in operands(shape)]
                record = measured(client, given, options.rounds, call)
                described = {"shape": str(shape), "dtype": label, **record}
                print(json.dumps(described), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.accumulator",
        description="The cost of a float64 accumulator.",
    )
    parser.add_argument("--rounds", type=int, default=9, help="of each job (9)")
    parser.add_argument("--shapes", default=SHAPES, help="MxNxK, ...")
    parser.add_argument("--dtypes", default=DTYPES, help="of the operands")
    parser.add_argument("--results", default="y,dx,dw", help="wanted results")
    parser.add_argument("--transport", default="grpc", choices=["grpc", "shm"])
    parser.add_argument("--address", help="of a running server, instead of a new one")
    return parser


if __name__ == "__main__":
    main()
