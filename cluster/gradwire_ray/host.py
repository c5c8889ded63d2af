"""One server, in the process of an actor.

The server runs in the actor's own process: one process ends, however it ends, and frees
its port and its GPU's memory at once. A child process would outlive an actor that was
killed.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import Any, TypeVar

from gradwire_ray.settings import PoolSettings
from gradwire_server import Server, Settings

T = TypeVar("T")

_LOOPBACK = "127.0.0.1"

ORPHAN_S = 60.0
"""Seconds without a job after which a server ends that has lost its node's raylet."""

LOOK_S = 1.0

_ANSWER_S = 10.0
"""Seconds for the server's event loop to say how many jobs it has."""


@dataclass(frozen=True, slots=True)
class Started:
    """A server that serves; the fields are those of `PoolServer`."""

    address: str
    local_address: str
    server_instance: str
    backend: str


@dataclass(frozen=True, slots=True)
class Load:
    """The jobs of a server."""

    running: int
    queued: int


class LostError(RuntimeError):
    """The server is not usable any longer, and must be started anew."""


class ServerHost:
    """A server in this process. Its methods may be called from several threads.

    Args:
        host: The node's IP address.
        settings: The pool's settings.
    """

    def __init__(self, host: str, settings: PoolSettings) -> None:
        self._host = host
        self._settings = settings
        self._lock = threading.Lock()
        self._server: Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="gradwire-server", daemon=True
        )

    def start(self) -> Started:
        """Start the server, unless it has started.

        Raises:
            ListenError: An address cannot be listened on.
            BackendError: The backend cannot be used here.
            CredentialsError: A file with credentials cannot be used.
            StateDirectoryError: The directory for saved states cannot be used.
        """
        with self._lock:
            if self._server is None:
                if self._settings.prepare is not None:
                    self._settings.prepare()
                server = Server(server_settings(self._host, self._settings))
                if not self._thread.is_alive():
                    self._thread.start()
                self._run(server.start())
                self._server = server
                threading.Thread(
                    target=self._end_as_orphan, args=(os.getppid(),), daemon=True
                ).start()
            server = self._server
        return Started(
            server.addresses[0],
            server.addresses[-1],
            server.instance,
            f"{server.backend_name}: {server.backend_reason}",
        )

    def load(self) -> Load:
        """Return the number of jobs.

        Raises:
            LostError: The server has not started, or a device failed for good.
            TimeoutError: The server's event loop does not answer.
        """
        server = self._server
        if server is None:
            raise LostError("the server has not started")
        if server.lost is not None:
            raise LostError(server.lost)

        async def counted() -> Load:
            return Load(server.running_jobs, server.queued_jobs)

        return self._run(counted(), _ANSWER_S)

    def drain(self) -> None:
        """Stop gracefully, within the server's grace period."""
        server = self._server
        if server is not None:
            self._run(server.drain())

    def _end_as_orphan(self, raylet: int) -> None:
        """End this process once its raylet has ended and no more jobs come.

        If the cluster's GCS is lost, raylets end after a minute, and no one manages
        their servers any longer. Those finish their jobs, and serve the clients that
        know them. But they must not hold port and GPU forever.
        """
        wait_until_orphan(raylet)
        idle_since = time.monotonic()
        while time.monotonic() - idle_since < ORPHAN_S:
            time.sleep(LOOK_S)
            load = self.load()
            if load.running or load.queued:
                idle_since = time.monotonic()
        self.drain()
        os._exit(0)

    def _run(self, task: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        future = asyncio.run_coroutine_threadsafe(task, self._loop)
        return future.result(timeout_s)


def wait_until_orphan(parent: int) -> None:
    """Wait until the parent of this process has ended.

    Args:
        parent: The parent's process id.
    """
    while os.getppid() == parent:
        time.sleep(LOOK_S)


def server_settings(host: str, settings: PoolSettings) -> Settings:
    """Return the settings of the server on a node.

    It listens on the node's IP address and on loopback, and shares memory with the
    node's processes: that is where `gradwire.ray.gradients` runs.

    Args:
        host: The node's IP address.
        settings: The pool's settings.
    """
    ip = ip_address(host)
    at = f"[{host}]" if ip.version == 6 else host
    hosts = [at] if ip.is_loopback else [at, _LOOPBACK]
    listen = tuple(f"{each}:{settings.port}" for each in hosts)
    return replace(settings.server, listen=listen, allow_shared_memory=True)
