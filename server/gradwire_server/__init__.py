"""The gradwire server: the gradients of a matrix product, as a gRPC service.

`Server` serves in the running event loop; `start_in_thread` serves in a program without
one; ``gradwire serve`` is the command.
"""

# isort: off
import gradwire_protocol  # noqa: F401 - first: it decides how grpc is loaded

# isort: on
from gradwire_server.embedded import start_in_thread
from gradwire_server.errors import (
    BackendError,
    BackendUnavailableError,
    CredentialsError,
    ListenError,
    StateDirectoryError,
    TracesError,
)
from gradwire_server.server import Server
from gradwire_server.settings import Settings

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
