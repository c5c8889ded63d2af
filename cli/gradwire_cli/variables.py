"""The environment variables of the command line.

A variable that nothing reads is refused: its author meant to change something,
and a misspelled one may be what turns credentials on.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping

from gradwire_cli.errors import CommandError, ExitStatus
from gradwire_cli.terminal.logs import LogSettings
from gradwire_server.settings import Settings

PREFIX = "GRADWIRE_"

_OF_CLIENTS = frozenset(
    PREFIX + name
    for name in (
        "ADDRESS",
        "CONNECT_TLS",
        "CONNECT_TLS_CA",
        "CONNECT_TLS_CERT",
        "CONNECT_TLS_KEY",
        "CONNECT_TLS_SERVER_NAME",
        "TOKEN",
        "TOKEN_FILE",
    )
)
_OF_CONTAINERS = frozenset(PREFIX + name for name in ("GPU_IMAGE", "IMAGE", "PUBLISH"))

SETTINGS = frozenset(
    field.name for of in (Settings, LogSettings) for field in dataclasses.fields(of)
)
"""The fields of all settings of ``gradwire serve``: each is a variable, and a key of
its file."""

KNOWN = (
    frozenset(PREFIX + name.upper() for name in SETTINGS)
    | {PREFIX + "CONFIG"}
    | _OF_CLIENTS
    | _OF_CONTAINERS
)
"""The variables that a command, the compose file or an image reads."""

_OF_OTHERS = re.compile(
    # Kubernetes sets these for each Service whose name begins with gradwire:
    # https://kubernetes.io/docs/concepts/services-networking/service/
    r"(.*_)?(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)"
    # The tests' own.
    r"|TEST_.*"
)


def check(environment: Mapping[str, str]) -> None:
    """Check that every variable of gradwire in the environment is read.

    Raises:
        CommandError: A variable is unknown.
    """
    for name in sorted(environment):
        rest = name.removeprefix(PREFIX)
        if rest == name or name in KNOWN:
            continue
        if not _OF_OTHERS.fullmatch(rest):
            meant = hint(rest, (each.removeprefix(PREFIX) for each in KNOWN), PREFIX)
            raise CommandError(
                f"the environment has an unknown variable: {name}{meant}",
                ExitStatus.USAGE,
            )


def hint(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of a sentence, with the known name that is most like `name`.

    Empty if no known name is like it.
    """
    near = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""
