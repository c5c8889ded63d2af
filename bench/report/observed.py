"""A server whose row blocks are timed: ``python -m bench.report.observed SETTINGS``.

Its argument is the settings as JSON. It prints its address, a unix socket: the
buffers are small, so sent bytes have really left. It serves until the end of its
standard input, then prints the observed events as JSON: lists of seconds, job, stage
and row block.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from tempfile import TemporaryDirectory
from typing import Any

from bench.report.timeline import Event
from gradwire_server import Server, Settings
from gradwire_server.observability.timeline import Stage


def events(printed: str) -> dict[str, list[Event]]:
    """Parse the process's final output: events by job."""
    seen: dict[str, list[Event]] = {}
    for at, job, stage, block in json.loads(printed):
        seen.setdefault(job, []).append((at, stage, block))
    return seen


async def _serve(settings: dict[str, Any]) -> None:
    seen: list[tuple[float, str, str, int | None]] = []

    def observe(job: str, stage: Stage, block: int | None) -> None:
        seen.append((time.perf_counter(), job, stage.value, block))

    with TemporaryDirectory(prefix="gradwire-bench-") as directory:
        listen = (f"unix:{directory}/socket",)
        server = Server(Settings(listen=listen, **settings), observe=observe)
        await server.start()
        print(*server.addresses, flush=True)
        await asyncio.to_thread(sys.stdin.read)
        await server.drain()
    print(json.dumps(seen))


if __name__ == "__main__":
    asyncio.run(_serve(json.loads(sys.argv[1])))
