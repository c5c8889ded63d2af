"""A server whose row blocks are timed: ``python -m bench.report.observed SETTINGS``.

Its one argument is the settings as JSON. It prints its address, a unix socket's
(whose buffers are small, so that what was sent has left), serves until
its standard input ends, and then prints what its observer saw: lists of
seconds, job, stage and row block, as JSON.
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
    """What was seen, by job, from what the process printed in the end."""
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
