"""What proxies cost: ``python -m tests.proxies.figures``.

Each round measures jobs directly and through each proxy, one after the other, on
loopback and over a link with a round trip of 20 ms (which needs root and iproute2). The
table has the medians of the rounds' ratios to the direct job.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Iterator
from typing import Any

from bench.links.namespaces import link
from tests.proxies.running import KINDS, running_proxy
from tests.proxies.test_links import JOB, ROUND_TRIP_S, Far
from tests.support.serving import running_server

SMALL = (64, 64, 64)


@contextlib.contextmanager
def ends(round_trip_s: float) -> Iterator[Far]:
    """Two servers at the other end of a link; on loopback without a round trip."""
    with contextlib.ExitStack() as stack:
        host, there, here = "127.0.0.1", [], []
        given: dict[str, Any] = {}
        if round_trip_s:
            here = stack.enter_context(link(1e10, round_trip_s))
            settings = dict(part.split("=", 1) for part in here if "=" in part)
            host = settings["BENCH_SERVER_HOST"]
            there = settings["BENCH_SERVER_COMMAND"].split()
            given = {"listen": [f"{host}:0"], "insecure": True, "prefix": there}
        servers = [
            stack.enter_context(running_server(**given)).address for _ in range(2)
        ]
        yield Far(host, there, here, servers)


def measured(round_trip_s: float, rounds: int) -> dict[str, list[float]]:
    """The ratios of each proxy: of the large job, then of the small one."""
    with ends(round_trip_s) as far, contextlib.ExitStack() as stack:
        addresses = {"direct": far.servers[0]}
        for kind in KINDS:
            proxy = running_proxy(kind, far.servers, host=far.host, prefix=far.there)
            addresses[kind.name] = stack.enter_context(proxy)
        ratios: dict[str, list[list[float]]] = {name: [] for name in addresses}
        for _ in range(rounds):
            seconds = {
                name: [
                    statistics.median(far.run(address, job, count)["seconds"])
                    for job, count in ((JOB, 5), (SMALL, 100))
                ]
                for name, address in addresses.items()
            }
            for name, own in seconds.items():
                pairs = zip(own, seconds["direct"], strict=True)
                ratios[name].append([one / other for one, other in pairs])
            print(round_trip_s, seconds, file=sys.stderr, flush=True)
        return {
            name: [statistics.median(column) for column in zip(*each, strict=True)]
            for name, each in ratios.items()
        }


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    found = {at: measured(at, rounds) for at in (0.0, ROUND_TRIP_S)}
    for kind in KINDS:
        row = [f"{ratio:.2f}" for at in found for ratio in found[at][kind.name]]
        print("|", " | ".join([kind.name, *row]), "|")


if __name__ == "__main__":
    main()
