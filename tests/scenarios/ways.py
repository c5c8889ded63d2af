"""The ways in which a job may travel: the same tests run over all of them.

A way is how a client connects, how its jobs are cut into messages, and where
their operands lie. Nothing that a caller may rely on depends on it, so a test
leaves a way out only where there is nothing to test:

- Rows that come one after another, and whatever a checksum protects, travel
  in messages: not in shared memory, nor in the one message of `COMPUTE`.
- A job in one message has no progress that its caller could see, and no place
  in the queue that it could be told.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradwire
from gradwire._client.job_factory import Tuning
from tests.support.serving import ServerProcess, running_server


@dataclass(frozen=True)
class Way:
    """A way from a client to the server that `serving_all` makes."""

    name: str
    options: Mapping[str, Any] = field(default_factory=lambda: {"transport": "grpc"})
    """Arguments of `gradwire.connect`."""
    unix: bool = False
    """Whether the client connects to the server's unix socket."""
    in_one_message: bool = False
    """Whether small jobs go through Compute."""
    inside: bool = False
    """Whether operands lie in arrays that the client has handed out."""

    def __str__(self) -> str:
        return self.name

    @property
    def transport(self) -> str:
        """What a receipt calls it."""
        if self.unix:
            return "unix"
        chosen = str(self.options["transport"])
        return "tcp" if chosen == "grpc" else chosen

    def address(self, server: ServerProcess) -> str:
        tcp, unix = server.addresses
        return unix if self.unix else tcp

    def tuning(self, **others: Any) -> Tuning:
        """How its clients cut jobs into messages."""
        unary = None if self.in_one_message else False
        return Tuning(**({"unary": unary} | others))

    def connect(self, server: ServerProcess, **options: Any) -> gradwire.Client:
        """A client that goes this way."""
        client = gradwire.connect(
            self.address(server), **({"timeout_s": 60} | self.options | options)
        )
        client._engine.jobs.tuning = self.tuning()
        return client

    def async_client(
        self, server: ServerProcess, **options: Any
    ) -> gradwire.AsyncClient:
        """One for asyncio; it connects when its context is entered."""
        client = gradwire.AsyncClient(
            self.address(server), **({"timeout_s": 60} | self.options | options)
        )
        client._engine.jobs.tuning = self.tuning()
        return client

    def arrived(self, receipt: gradwire.Receipt, *, checksum: bool = False) -> None:
        """Checks that a job of arrays did travel this way."""
        # Where nothing is to be moved in rows, nothing is moved elsewhere.
        in_messages = checksum
        if self.transport == "direct":
            in_messages = not receipt.m or not receipt.bytes_received
        if self.transport in {"shm", "direct"} and in_messages:
            assert receipt.transport == "tcp"
        else:
            assert receipt.transport == self.transport


COMPUTE = Way("compute", in_one_message=True)
STREAM = Way("stream")
UNIX = Way("unix", unix=True)
SHARED = Way("shm", {"transport": "shm"}, inside=True)
COPIED = Way("shm-copied", {"transport": "shm"})
DIRECT = Way("direct", {"transport": "direct"})

IN_MESSAGES = (STREAM, UNIX)
IN_STEPS = (*IN_MESSAGES, SHARED, COPIED, DIRECT)
WAYS = (COMPUTE, *IN_STEPS)


@contextmanager
def serving_all(**settings: Any) -> Iterator[ServerProcess]:
    """A server that can be reached in every way."""
    with TemporaryDirectory(prefix="gradwire-test-") as directory:
        listen = ["127.0.0.1:0", f"unix:{Path(directory) / 'socket'}"]
        settings = {"listen": listen, "allow_shared_memory": True} | settings
        with running_server(**settings) as server:
            yield server
