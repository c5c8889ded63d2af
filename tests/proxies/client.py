"""A job through a proxy at the other end of a link: python -m tests.proxies.client.

It prints the seconds of the fastest of some jobs, and the bits of the last, as JSON.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time

import gradwire
from tests.support import oracle


def main(address: str, m: int, n: int, k: int, count: int) -> None:
    operands = oracle.operands(m, n, k)
    seconds = []
    with gradwire.connect(
        address, transport="grpc", timeout_s=100, wait_for_ready_s=30
    ) as client:
        for _ in range(count):
            began = time.perf_counter()
            result = client.gradients(*operands)
            seconds.append(time.perf_counter() - began)
            assert result.receipt.attempts == 1
    digest = hashlib.sha256(b"".join(each.tobytes() for each in result)).hexdigest()
    print(json.dumps({"seconds": seconds, "digest": digest}))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
