"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from cyclopts import Parameter

DEFAULT_ADDRESS = "127.0.0.1:50051"
"""Where ``gradwire serve`` listens unless it is told otherwise."""

Address: TypeAlias = Annotated[
    str | None,
    Parameter(
        metavar="ADDRESS",
        env_var="GRADWIRE_ADDRESS",
        help="The server: HOST:PORT or unix:PATH.",
    ),
]
"""``--address`` or GRADWIRE_ADDRESS."""

FLAG = Parameter(negative=(), show_default=False)
"""An option that is there or is not."""

Seconds: TypeAlias = Annotated[float, Parameter(metavar="SECONDS")]
"""A time."""
