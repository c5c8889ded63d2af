"""A private server in a thread of this process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from gradwire_server.server import Server
from gradwire_server.settings import Settings
from gradwire_server.transports.listener import can_be_a_socket

_LOOPBACK = "127.0.0.1:0"


@contextmanager
def start_in_thread(settings: Settings | None = None) -> Iterator[Server]:
    """Serve in this process until the context is left.

    Args:
        settings: Default: a unix socket in a fresh directory that only this user can
            enter (a loopback port if its path cannot be a socket's), NumPy, and the
            process's BLAS and memory allocator unchanged.

    Yields:
        The started server; clients connect to its `addresses`.

    Raises:
        ListenError: An address cannot be listened on.
        BackendError: The backend cannot be used here.
        CredentialsError: A file with credentials cannot be used.
    """
    with TemporaryDirectory(prefix="gradwire-") as directory:
        if settings is None:
            path = Path(directory) / "socket"
            private = f"unix:{path}" if can_be_a_socket(path) else _LOOPBACK
            settings = Settings(
                listen=(private,),
                backend="numpy",
                cpu_threads=0,
                cpu_niceness=0,
                keep_memory=False,
            )
        server = Server(settings)
        loop = asyncio.new_event_loop()
        thread = threading.Thread(
            target=loop.run_forever, name="gradwire-server", daemon=True
        )
        thread.start()
        try:
            asyncio.run_coroutine_threadsafe(server.start(), loop).result()
            try:
                yield server
            finally:
                asyncio.run_coroutine_threadsafe(server.stop(), loop).result()
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()
