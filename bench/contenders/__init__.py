"""The contenders: ways to compute the three gradients, behind one interface.

To add a contender, write a module with a `create` function and add a line to
`_KNOWN`. Each module is imported only in its own worker process, so contenders do
not affect each other.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.contenders.interface import Contender


@dataclass(frozen=True, slots=True)
class _Known:
    module: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    needs: str | None = None
    """A package needed only by this contender."""


def _gradwire(transport: str = "grpc", **arguments: Any) -> _Known:
    return _Known("gradwire_sdk", {"transport": transport, **arguments})


_KNOWN = {
    "numpy": _Known("local_numpy"),
    "gradwire-grpc": _gradwire(),
    "gradwire-direct": _gradwire("direct"),
    "gradwire-auto": _gradwire(block_rows="auto"),
    "gradwire-unix": _gradwire(unix=True),
    "gradwire-shm": _gradwire("shm"),
    "gradwire-grpc-tls": _gradwire(tls=True),
    "gradwire-direct-tls": _gradwire("direct", tls=True),
    "grpcio-unary": _Known("grpcio_unary"),
    "grpcio-stream": _Known("grpcio_stream"),
    "arrow-flight": _Known("arrow_flight", needs="pyarrow"),
    "torch-rpc": _Known("torch_rpc", needs="torch"),
    "raw-tcp": _Known("raw_tcp"),
    "raw-shm": _Known("raw_shm"),
}
_BY_ADDRESS = "oip@"

NAMES = tuple(_KNOWN)
"""All contenders, in the order of the table. The first is the yardstick.

Servers of the Open Inference Protocol are not listed; their names are
``oip@HOST:PORT`` or ``oip@HOST:PORT/MODEL``.
"""

WHOLE_JOBS = tuple(name for name in NAMES if not name.endswith("-tls"))
"""The contenders whose calls are timed with their products."""

TRANSPORTS = (
    "gradwire-grpc",
    "gradwire-grpc-tls",
    "gradwire-direct",
    "gradwire-direct-tls",
    "arrow-flight",
    "raw-tcp",
)
"""The contenders that are timed without products: those that send and receive at once.
The first is the yardstick."""


def missing(name: str) -> str | None:
    """The missing package of a contender, or None."""
    known = _KNOWN.get(name)
    if known is None or known.needs is None or importlib.util.find_spec(known.needs):
        return None
    return known.needs


def create(name: str) -> Contender:
    """Make the contender of this name, not started.

    Raises:
        KeyError: The name is unknown.
    """
    if name.startswith(_BY_ADDRESS):
        known = _Known("open_inference", {"where": name.removeprefix(_BY_ADDRESS)})
    else:
        known = _KNOWN[name]
    module = importlib.import_module(f"bench.contenders.{known.module}")
    contender: Contender = module.create(**known.arguments)
    return contender
