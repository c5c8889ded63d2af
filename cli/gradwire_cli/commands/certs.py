"""``gradwire certs``."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from cyclopts.validators import Number

from gradwire_cli.errors import CommandError, ExitStatus

_PUBLIC, _PRIVATE = 0o644, 0o600

app = App(
    name="certs",
    usage="Usage: gradwire certs DIR [OPTIONS]",
    help="""
    Make certificates for a trial of TLS.

    Writes an authority (ca.pem), and what it vouches for: a server (server.pem)
    for localhost and the names that --host gives, and a client (client.pem).
    Their private keys (ca-key.pem and so on) are for this user alone. Says how
    a server and a client are started with them.

    For more than a trial, have an authority that keeps its key away from both.
    """,
)


@app.default
def certs(
    directory: Annotated[Path, Parameter(metavar="DIR")],
    /,
    *,
    host: Annotated[
        tuple[str, ...], Parameter(metavar="NAME", negative=(), show_default=False)
    ] = (),
    client: Annotated[str, Parameter(metavar="NAME")] = "client",
    days: Annotated[int, Parameter(validator=Number(gte=1, lte=3650))] = 30,
) -> None:
    """Make certificates for a trial of TLS.

    Args:
        directory: Where they go; made when it is missing. Nothing in it is
            replaced.
        host: Name or IP address under which clients reach the server, beside
            localhost, 127.0.0.1 and ::1; may be given repeatedly.
        client: The name in the client's certificate.
        days: How long they are good for.
    """
    # Not at the top: no other command needs it, and it takes a while.
    from gradwire_cli.certificate_authority import Authority  # noqa: PLC0415

    try:
        authority = Authority(days)
        identities = {
            "ca": authority.identity,
            "server": authority.server(["localhost", "127.0.0.1", "::1", *host]),
            "client": authority.client(client),
        }
    except ValueError as error:
        raise CommandError(str(error), ExitStatus.USAGE) from None
    contents: dict[str, tuple[bytes, int]] = {}
    for name, identity in identities.items():
        contents[f"{name}.pem"] = identity.cert, _PUBLIC
        contents[f"{name}-key.pem"] = identity.key, _PRIVATE
    _write(directory, contents)
    sys.stdout.write(_what_next(directory, [*host, "localhost"][0], days))


def _write(directory: Path, contents: Mapping[str, tuple[bytes, int]]) -> None:
    """Write new files, all of them or none.

    Raises:
        CommandError: There is one already, or they cannot be written.
    """
    made: list[Path] = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, (content, mode) in contents.items():
            path = directory / name
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            made.append(path)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
    except OSError as error:
        for path in made:
            path.unlink()
        if isinstance(error, FileExistsError):
            text = f"{error.filename} is there already, and stays: nothing was made"
        else:
            text = f"{directory} cannot be written: {error.strerror or error}"
        raise CommandError(text) from None


def _what_next(directory: Path, host: str, days: int) -> str:
    def path(name: str) -> str:
        return shlex.quote(str(directory / name))

    address = f"[{host}]:50051" if ":" in host else f"{host}:50051"
    listen = "localhost:50051" if host == "localhost" else "[::]:50051"
    return f"""\
{directory} has an authority, a server and a client, good for {days} days.

A server that wants to see clients' certificates:

    gradwire serve --listen {listen} \\
      --tls-cert {path("server.pem")} --tls-key {path("server-key.pem")} \\
      --tls-client-ca {path("ca.pem")}

Its clients:

    gradwire check --address {address} --tls-ca {path("ca.pem")} \\
      --tls-cert {path("client.pem")} --tls-key {path("client-key.pem")}

    gradwire.connect({address!r}, tls=gradwire.Tls(
        ca={str(directory / "ca.pem")!r},
        cert={str(directory / "client.pem")!r},
        key={str(directory / "client-key.pem")!r},
    ))

Clients elsewhere need those three files, and no other key.
"""
