"""A client that does, round by round, what long-lived ones do.

    python -m tests.thorough.load.hour ADDRESS UNIX_ADDRESS

prints a line when it is ready. For each line on its standard input it does a
round: 150 calls, one in two seconds of five minutes, of which most are small and
come from one client, and some are streams, in shared memory, over new
connections, refused, cancelled half way, or out of time. Then it prints what
became of them and its own resident memory, as JSON.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
from collections import Counter

import numpy as np

import gradwire
from tests.support import oracle
from tests.support.observing import memory_of

SMALL, LARGE = (32, 24, 16), (2000, 64, 48)
CALLS = 150


def step(client: gradwire.Client, shared: gradwire.Client, number: int) -> str:
    """One call; what kind it was."""
    x, w, dy = oracle.operands(*SMALL)
    match number % 30:
        case 3 | 17:
            x, w, dy = oracle.operands(*LARGE)
            y, _, _ = client.gradients(x, w, dy, checksum=number % 30 == 3)
            assert y.shape == (LARGE[0], LARGE[2])
            return "large"
        case 7:
            with client.stream(((x, dy) for _ in range(40)), w) as stream:
                rows = sum(block.y.shape[0] for block in stream)
            assert rows == 40 * SMALL[0]
            return "stream"
        case 11:
            with client.stream(((x, dy) for _ in range(10**6)), w) as stream:
                next(iter(stream))
            return "left"
        case 13:
            out = [shared.empty(shape) for shape in (SMALL[::2], SMALL[:2], SMALL[1:])]
            shared.gradients(x, w, dy, out=out)
            return "shared"
        case 19:
            address = client.address
            with gradwire.connect(address, transport="grpc") as another:
                another.gradients(x, w, dy)
            return "connected"
        case 23:
            with contextlib.suppress(gradwire.InputError):
                client.gradients(x, w, dy[:-1])
            return "refused"
        case 29:
            with contextlib.suppress(gradwire.DeadlineError):
                client.gradients(*oracle.operands(*LARGE), timeout_s=0.001)
            return "late"
        case _:
            y, _, _ = client.gradients(x, w, dy)
            assert np.isfinite(y).all()
            return "small"


def main(address: str, unix: str) -> None:
    with (
        gradwire.connect(address, transport="grpc", retries=False) as client,
        gradwire.connect(unix, transport="shm", retries=False) as shared,
    ):
        print("ready", flush=True)
        number = 0
        for _ in sys.stdin:
            done: Counter[str] = Counter()
            for _ in range(CALLS):
                done[step(client, shared, number)] += 1
                number += 1
            gc.collect()
            seen = {**done, "resident_bytes": memory_of(os.getpid(), "VmRSS")}
            print(json.dumps(seen), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
