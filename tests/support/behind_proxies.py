"""A server behind two proxies: one for its calls, one for direct connections."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import gradwire
from tests.support import oracle
from tests.support.proxy import Proxy
from tests.support.serving import ServerProcess, running_server

M, N, K = 405, 30, 20
X, W, DY = oracle.operands(M, N, K)
ALL = ("y", "dx", "dw", "db")
"""A job with many row blocks on such a server, and all results."""

LOST = {"UNAVAILABLE", "CONNECTION_LOST"}
"""What `receipt.retried` says after a connection broke."""

SOON = gradwire.RetryPolicy(
    attempts=100, initial_backoff_s=0.01, max_backoff_s=0.05, budget=1e6
)


class Behind:
    """A server, and the proxies before its two ports.

    Attributes:
        server: The server.
        call: The proxy for calls.
        data: The proxy for direct connections.
    """

    def __init__(self, server: ServerProcess, call: Proxy, data: Proxy) -> None:
        self.server, self.call, self.data = server, call, data

    def connect(self, **options: Any) -> gradwire.Client:
        """A client that goes through both, and retries soon."""
        options = {"transport": "direct", "retries": SOON, "timeout_s": 60} | options
        return gradwire.connect(self.call.address, **options)

    def heal(self) -> None:
        """Let the proxies forward everything again."""
        for each in (self.call, self.data):
            each.arm(None)
            each.resume()


@contextlib.contextmanager
def behind_proxies(**settings: Any) -> Iterator[Behind]:
    """A server of small row blocks with these settings, in which nothing goes wrong."""
    settings = {"row_block_bytes": 4096} | settings
    with (
        Proxy("127.0.0.1:1") as data,
        running_server(data_advertise=data.address, **settings) as server,
        Proxy(server.address) as call,
    ):
        data.target = server.wait_for_log(lambda each: "data" in each)["data"]
        yield Behind(server, call, data)
        assert not [each for each in server.records if "traceback" in each]


def moving_threads() -> list[threading.Thread]:
    """Threads of clients here that move elements, and timers of theirs."""
    return [
        each
        for each in threading.enumerate()
        if each.name.startswith(("gradwire-up", "gradwire-down"))
        or (isinstance(each, threading.Timer) and not each.finished.is_set())
    ]
