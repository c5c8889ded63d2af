"""What metrics cost a small call: ``python -m bench.metrics``.

Pairs of servers, one with `metrics-listen` and one without, are asked for 32³ products
in turn, 250 calls at a time. Prints a line of JSON for each pair: microseconds of
processor time that each server takes for a call, and the difference over those of a
whole call, of client and server. A server with metrics is scraped once a second, more
often than anybody would. The first pair has none: it shows what chance makes of it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import gradwire
from bench.driver import rotated
from bench.work import Shape, operands

SMALL = Shape(32, 32, 32)
TURN = 250
_READY = re.compile(r"serves on (\S+) .*?(?:metrics on (\S+))?$")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.metrics", description="What metrics cost a small call."
    )
    parser.add_argument("--calls", type=int, default=20_000, help="to each server")
    parser.add_argument("--pairs", type=int, default=3, help="with and without (3)")
    options = parser.parse_args()
    for number in range(options.pairs + 1):
        metrics = number > 0
        found = measured(options.calls // TURN, metrics=metrics)
        print(json.dumps({"metrics": metrics} | found), flush=True)


def measured(turns: int, *, metrics: bool) -> dict[str, float]:
    """Compare a server with one that may have metrics; microseconds a call."""
    given = operands(SMALL)
    server_us: list[list[float]] = [[], []]
    whole_us: list[list[float]] = [[], []]
    scraped_at = 0.0
    with ExitStack() as stack:
        servers = [stack.enter_context(Server(metrics=m)) for m in (False, metrics)]
        clients = [
            stack.enter_context(gradwire.connect(each.address, transport="grpc"))
            for each in servers
        ]
        for turn in range(-2, turns):
            for which in rotated([0, 1], turn):
                server, client = servers[which], clients[which]
                before = busy_ns(server.pid), busy_ns(os.getpid())
                for _ in range(TURN):
                    client.gradients(*given)
                if server.metrics and time.monotonic() > scraped_at + 1:
                    scraped_at = time.monotonic()
                    urllib.request.urlopen(server.metrics).read()
                took = busy_ns(server.pid) - before[0]
                ours = busy_ns(os.getpid()) - before[1]
                if turn >= 0:
                    server_us[which].append(took / TURN / 1000)
                    whole_us[which].append((took + ours) / TURN / 1000)
    least = [statistics.median(each) for each in server_us]
    whole = statistics.median(whole_us[0])
    more = [b - a for a, b in zip(*server_us, strict=True)]
    found = {
        "without_us": least[0],
        "with_us": least[1],
        "whole_call_us": whole,
        "more_us": statistics.median(more),
        "more_of_a_call": statistics.median(more) / whole,
    }
    return {name: round(value, 5) for name, value in found.items()}


class Server:
    """A `gradwire serve` of its own; with metrics or without."""

    def __init__(self, *, metrics: bool) -> None:
        command = [sys.executable, "-m", "gradwire_cli", "serve", "--backend=numpy"]
        command += ["--listen=127.0.0.1:0", "--log-level=warning"]
        command += ["--metrics-listen=0"] if metrics else []
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        ready = _READY.search(self._process.stdout.readline().strip())
        assert ready is not None
        self.address, self.metrics = ready[1], ready[2]
        self.pid = self._process.pid

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)


def busy_ns(pid: int) -> int:
    """Processor time of a process's threads, nanoseconds."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((each / "schedstat").read_text().split()[0]) for each in threads)


if __name__ == "__main__":
    main()
