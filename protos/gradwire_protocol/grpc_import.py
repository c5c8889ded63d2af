"""How gRPC is imported: with fork support, and without its log lines.

gRPC decides both once, at its import, by environment variables. Here they are
set for just that moment. A program that sets them itself, or imports grpc before
gradwire, keeps what it has chosen.
"""

from __future__ import annotations

import importlib
import os
import sys

FORK_SUPPORT = "GRPC_ENABLE_FORK_SUPPORT"
"""Has gRPC hold its threads still across forks, so that children can use it."""

_CHOSEN = {
    FORK_SUPPORT: "1",
    # Handshakes that fail are logged at INFO: the caller is told by an exception,
    # and scans of open ports would fill a server's log.
    "GRPC_VERBOSITY": "ERROR",
}


def import_grpc() -> None:
    """Import grpc, unless it was imported already."""
    if "grpc" in sys.modules:
        return
    chosen = {name: value for name, value in _CHOSEN.items() if name not in os.environ}
    os.environ.update(chosen)
    try:
        importlib.import_module("grpc")
    finally:
        for name in chosen:
            del os.environ[name]
