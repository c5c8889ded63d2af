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
    Make certificates to try TLS.

    Writes the certificates of an authority (ca.pem), a server (server.pem, for
    localhost and every --host) and a client (client.pem). The private keys
    (ca-key.pem and so on) are readable by this user only. Prints commands that
    start a server and a client with the certificates.

    In production, keep the authority's key away from servers and clients.
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
    """Make certificates to try TLS.

    Args:
        directory: Output directory; created if missing. Existing files are kept.
        host: Host name or IP address of the server, in addition to localhost,
            127.0.0.1 and ::1; may be repeated.
        client: Name in the client certificate.
        days: Days until the certificates expire.
    """
    # Imported here: only this command needs it, and the import is slow.
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
    """Write new files, all or none.

    Raises:
        CommandError: A file exists, or cannot be written.
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
            text = f"{error.filename} exists already: no file was written"
        else:
            text = f"{directory} cannot be written: {error.strerror or error}"
        raise CommandError(text) from None


def _what_next(directory: Path, host: str, days: int) -> str:
    def path(name: str) -> str:
        return shlex.quote(str(directory / name))

    address = f"[{host}]:50051" if ":" in host else f"{host}:50051"
    listen = "localhost:50051" if host == "localhost" else "[::]:50051"
    return f"""\
{directory} has certificates for an authority, a server and a client, valid {days} days.

Start a server with mutual TLS:

    gradwire serve --listen {listen} \\
      --tls-cert {path("server.pem")} --tls-key {path("server-key.pem")} \\
      --tls-client-ca {path("ca.pem")}

Connect a client:

    gradwire check --address {address} --tls-ca {path("ca.pem")} \\
      --tls-cert {path("client.pem")} --tls-key {path("client-key.pem")}

    gradwire.connect({address!r}, tls=gradwire.Tls(
        ca={str(directory / "ca.pem")!r},
        cert={str(directory / "client.pem")!r},
        key={str(directory / "client-key.pem")!r},
    ))

Clients on other hosts need these three files, and no other key.
"""
