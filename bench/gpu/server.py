"""Server process of the GPU bench, without dependencies on extras.

``python -m bench.gpu.server cupy PATH`` serves on a local port and on a unix socket at
PATH, with shared memory.
"""

from __future__ import annotations

import asyncio
import signal
import sys

from bench.contenders.server_process import HOST, say_ready
from gradwire_server import Server, Settings


async def serve(backend: str, path: str) -> None:
    settings = Settings(
        listen=(f"{HOST}:0", f"unix:{path}"),
        backend=backend,
        allow_shared_memory=True,
    )
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    async with Server(settings) as server:
        say_ready(server.addresses[0])
        await stopped.wait()


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:]))
