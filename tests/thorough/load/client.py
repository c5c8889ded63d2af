"""A client in a process of its own, which tells what memory a job took there.

    python -m tests.thorough.load.client ADDRESS CONNECT JOB

CONNECT has the arguments of `gradwire.connect` and JOB those of a method, as
JSON: `rows` and `times` (a stream of so many times the same rows), or `rows`
alone (arrays, which are there before) with `inside` (arrays that the client
hands out); `options` are the method's. It prints a line when all is ready,
runs the job when it has been given one, prints what was seen, as JSON, and
keeps what it shares until its standard input is closed.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from typing import Any

import numpy as np

import gradwire
from gradwire._client.job_factory import Tuning
from tests.support.observing import forget_peak_of, memory_apart, peak_apart

N = K = 64


def stream(client: gradwire.Client, rows: int, times: int, **options: Any) -> Any:
    """Looks at the results of a stream as they come, and keeps none."""
    x, w, dy = (np.ones(shape, "f4") for shape in ((rows, N), (N, K), (rows, K)))
    with client.stream(((x, dy) for _ in range(times)), w, **options) as blocks:
        for block in blocks:
            assert block.y is not None
            assert (block.y == N).all()
            assert (block.dx == K).all()
    assert blocks.dw is not None
    assert (blocks.dw == rows * times).all()
    return blocks.receipt


def arrays(client: gradwire.Client, rows: int, *, inside: bool, **options: Any) -> Any:
    """Arrays for a job and its results, and what runs it."""
    empty = client.empty if inside else np.empty
    shapes = ((rows, N), (N, K), (rows, K))
    x, w, dy = operands = [empty(shape, np.float32) for shape in shapes]
    out = [empty(shape, np.float32) for shape in ((rows, K), (rows, N), (N, K))]
    for array in (*operands, *out):
        array[...] = 1

    def run() -> Any:
        result = client.gradients(x, w, dy, out=out, **options)
        for first in range(0, rows, 1000):  # a look takes memory too
            assert (result.y[first : first + 1000] == N).all()
            assert (result.dx[first : first + 1000] == K).all()
        assert (result.dw == rows).all()
        return result.receipt

    return run


def main(address: str, connect: str, job: str) -> None:
    wanted = json.loads(job)
    options = wanted.pop("options", {})
    with gradwire.connect(address, timeout_s=100, **json.loads(connect)) as client:
        client._engine.jobs.tuning = Tuning(unary=False)
        stream(client, 1000, 2)
        if "times" in wanted:
            stream(client, wanted["rows"], 2, **options)
            run = partial(stream, client, **wanted, **options)
        else:
            small = {**wanted, "rows": 1000}
            arrays(client, **small, **options)()
            run = arrays(client, **wanted, **options)
        print("ready", flush=True)
        sys.stdin.readline()
        pid = os.getpid()
        before = memory_apart(pid)
        forget_peak_of(pid)
        receipt = run()
        seen = {
            "took_bytes": peak_apart(pid) - before,
            "reserved_bytes": receipt.reserved_bytes,
            "moved_bytes": receipt.bytes_received + receipt.bytes_sent,
            "m": receipt.m,
            "transport": receipt.transport,
        }
        print(json.dumps(seen), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
