"""Starts `bench.server`, without importing it into the client's process."""

from __future__ import annotations

import os
from typing import Literal, TypeAlias

from bench.contenders.server_process import HOST, ServerProcess

Kind: TypeAlias = Literal["numpy", "idle", "idle-products"]


def start(kind: str, *flags: str) -> ServerProcess:
    """Start ``gradwire serve`` with the NumPy backend or one that computes nothing.

    Args:
        kind: One of `bench.server.KINDS`, or what `bench.server` makes of it.
        flags: Flags of ``gradwire serve``. Without ``--listen``, it listens on a free
            TCP port.
    """
    given = list(flags)
    if "--listen" not in flags:
        given += ["--listen", f"{HOST}:0"]
    if "--tls-cert" not in flags:
        # A link of the bench is private, so plaintext is safe.
        given += ["--insecure"]
    if threads := os.environ.get("OPENBLAS_NUM_THREADS"):
        given += ["--cpu-threads", threads]
    # The log line of every job would appear in the table.
    given += ["--backend", "numpy", "--log-level", "error"]
    return ServerProcess.of_module("bench.server", kind, *given)
