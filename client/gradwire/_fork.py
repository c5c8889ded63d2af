"""gRPC loaded so that a process may fork while calls are running.

gRPC decides at its import whether its threads are held still across a fork.
Without that, the child of a process that forks in the middle of a call hangs
in its own first call; with it, the child can make channels of its own. So
gRPC is imported here, before anything else of gradwire imports it, with the
variable that asks for it set for just that moment. A program that sets
``GRPC_ENABLE_FORK_SUPPORT`` itself, or imports grpc before gradwire, keeps
what it has chosen.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable

VARIABLE = "GRPC_ENABLE_FORK_SUPPORT"


def import_grpc() -> None:
    """Import grpc with fork support, unless either was settled elsewhere."""
    if "grpc" in sys.modules or VARIABLE in os.environ:
        return
    os.environ[VARIABLE] = "1"
    try:
        importlib.import_module("grpc")
    finally:
        del os.environ[VARIABLE]


def in_child(callback: Callable[[], None]) -> None:
    """Have `callback` called in every child that this process forks."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=callback)


import_grpc()
