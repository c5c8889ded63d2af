"""Import of gRPC with fork support and without its log lines.

gRPC reads both settings once, from environment variables at import. This module
sets the variables only during the import. A program that sets them, or imports
grpc before gradwire, keeps its own settings.
"""

from __future__ import annotations

import importlib
import os
import sys

FORK_SUPPORT = "GRPC_ENABLE_FORK_SUPPORT"
"""Makes gRPC pause its threads during forks, so that children can use it."""

_CHOSEN = {
    FORK_SUPPORT: "1",
    # gRPC logs failed handshakes at INFO. The caller gets an exception anyway, and
    # port scans would fill a server's log.
    "GRPC_VERBOSITY": "ERROR",
}


def import_grpc() -> None:
    """Import grpc unless it is imported already."""
    if "grpc" in sys.modules:
        return
    chosen = {name: value for name, value in _CHOSEN.items() if name not in os.environ}
    os.environ.update(chosen)
    try:
        importlib.import_module("grpc")
    finally:
        for name in chosen:
            del os.environ[name]
