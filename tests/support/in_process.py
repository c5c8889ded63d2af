"""A server in this process, with a backend that a test can look into."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gradwire_server import Server, Settings


@contextmanager
def serving(backend: Any, **settings: Any) -> Iterator[Server]:
    """A server in a thread."""
    settings = {"listen": ("127.0.0.1:0",), "keep_memory": False} | settings
    server = Server(Settings(**settings), backend)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result(30)
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
