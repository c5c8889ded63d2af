"""Trace of overlapping stages: ``python -m bench.trace``, or ``make trace``.

One job streams through a link to a server that records when each row block is
received, computed and sent. By default the link's rate balances the stages: each way,
a row block takes a tenth longer on the link than its products. A first, short job
without the link measures the products. (On a faster link, operands arrive further
ahead than the next block.)
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import gradwire
from bench.child import Child
from bench.report import observed
from bench.report.timeline import STAGES, Timeline
from bench.work import Array, Shape, operands

OUT = Path(__file__).parent / "out"
_FIRST_BLOCKS = 4


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    n, k = options.columns
    settings = {"backend": "numpy", "row_block_bytes": options.row_block_bytes}
    settings["cpu_threads"] = options.cpu_threads
    with Child("bench.report.observed", json.dumps(settings)) as server:
        with gradwire.connect(server.address, transport="grpc") as client:
            rows = _block_rows(client, n, k)
            given = operands(Shape(rows, n, k))
            first = _run(client, given, _FIRST_BLOCKS)
        computing_s = first.computing_s / first.blocks
        bytes_per_s = options.rate * 1e9 / 8 if options.rate else None
        if bytes_per_s is None:
            bytes_per_s = rows * (n + k) * 4 / (1.1 * computing_s)
        with (
            Child("bench.links.relay", server.address, str(bytes_per_s)) as link,
            gradwire.connect(link.address, transport="grpc") as client,
        ):
            receipt = _run(client, given, options.blocks)
        seen = observed.events(server.stop())
    timeline = Timeline.of(seen[receipt.job_id])
    title = (
        f"{receipt.m}x{n}x{k}: {receipt.blocks} row blocks of {rows}, over a link of"
        f" {bytes_per_s * 8 / 1e9:.2f} Gbit/s each way"
    )
    met, of = timeline.overlapped()
    share = f"{met} of {of} row blocks ({100 * met / max(1, of):.0f} %)"
    print(title)
    for stage in STAGES:
        print(f"  {stage:<9} {timeline.mean_s(stage) * 1e3:8.1f} ms a block")
    print(f"{share} are computed while the next arrives and the last leaves.")
    alone_s = sum(timeline.mean_s(stage) for stage in STAGES) * timeline.count
    print(
        f"The job took {timeline.seconds:.2f} s; one stage after the other it would"
        f" have been {alone_s:.2f} s."
    )
    options.out.mkdir(parents=True, exist_ok=True)
    trace, figure = options.out / "trace.json", options.out / "trace.svg"
    trace.write_text(json.dumps(timeline.chrome_trace()))
    timeline.draw(figure, f"{title}\n{share} overlap with both neighbours")
    print(f"{trace} (for https://ui.perfetto.dev or chrome://tracing)\n{figure}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.trace",
        description="Trace when each row block arrives, is computed and leaves.",
    )
    parser.add_argument(
        "--columns",
        type=_columns,
        default=(1024, 1024),
        help="n and k, as NxK or one number for both (1024)",
    )
    parser.add_argument("--blocks", type=int, default=24, help="row blocks (24)")
    parser.add_argument(
        "--row-block-bytes", type=int, default=16 << 20, help="the server's setting"
    )
    parser.add_argument(
        "--cpu-threads",
        type=int,
        default=max(1, (os.cpu_count() or 1) // 2),
        help="the server's setting; by default half of the processors, because client"
        " and link run on this machine, too",
    )
    parser.add_argument(
        "--rate",
        type=float,
        help="Gbit/s of the link each way; by default, to balance the stages",
    )
    parser.add_argument("--out", type=Path, default=OUT, help="directory (bench/out)")
    return parser


def _columns(text: str) -> tuple[int, int]:
    n, _, k = text.partition("x")
    return int(n), int(k or n)


def _block_rows(client: gradwire.Client, n: int, k: int) -> int:
    nothing = operands(Shape(0, n, k))
    return client.gradients(*nothing).receipt.block_rows


def _run(
    client: gradwire.Client, given: tuple[Array, Array, Array], blocks: int
) -> gradwire.Receipt:
    """Run a job that repeats one row block, so memory for one suffices."""
    x, w, dy = given
    pairs = itertools.repeat((x, dy), blocks)
    with client.stream(pairs, w, m=blocks * len(x)) as stream:
        for _ in stream:
            pass
    return stream.receipt


if __name__ == "__main__":
    sys.exit(main())
