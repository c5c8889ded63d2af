"""The gradwire server: the gradients of a matrix product, as a gRPC service.

`Server` serves in the running event loop; `start_in_thread` serves in a program without
one; ``gradwire serve`` is the command.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# isort: off
import gradwire_protocol  # noqa: F401 - first: it decides how grpc is loaded

# isort: on
from gradwire_server.errors import (
    BackendError,
    BackendUnavailableError,
    CredentialsError,
    ListenError,
    StateDirectoryError,
    TracesError,
)
from gradwire_server.settings import Settings

if TYPE_CHECKING:
    from gradwire_server.embedded import start_in_thread
    from gradwire_server.server import Server

__all__ = [
    "BackendError",
    "BackendUnavailableError",
    "CredentialsError",
    "ListenError",
    "Server",
    "Settings",
    "StateDirectoryError",
    "TracesError",
    "start_in_thread",
]

# Imported with their first use: a command that starts no server reads settings only.
_LAZY = {"Server": "server", "start_in_thread": "embedded"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
