"""``gradwire token``."""

from __future__ import annotations

import datetime
import os
import stat
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter
from rich.table import Table

from gradwire_cli.errors import CommandError, ExitStatus
from gradwire_cli.terminal.tables import console

if TYPE_CHECKING:
    from gradwire_server.auth.tokens import Tokens

File = Annotated[Path, Parameter(metavar="FILE", env_var="GRADWIRE_AUTH_TOKENS")]

app = App(
    name="token",
    help="""
    Make, list and revoke tokens in a server's --auth-tokens FILE.

    The file holds hashes, so a token is shown only once. A running server
    reloads the file after a change.
    """,
)


@app.command
def new(
    tenant: str,
    *,
    file: Annotated[
        Path | None, Parameter(metavar="FILE", env_var="GRADWIRE_AUTH_TOKENS")
    ] = None,
) -> None:
    """Make a token and print it once.

    Standard output has only the token.

    Args:
        tenant: Owner of the token, as named in the server's log.
        file: Tokens file to add the token's hash to; created if missing.
            Default: print the lines to add on standard error.
    """
    # Imported here: the server package may not be installed.
    from gradwire_server.auth.tokens import new_token  # noqa: PLC0415

    try:
        token, entry = new_token(tenant, datetime.datetime.now(datetime.UTC).date())
    except ValueError as error:
        raise CommandError(str(error), ExitStatus.USAGE) from None
    if file is None:
        sys.stderr.write(f"add this to the --auth-tokens file:\n\n{entry.toml()}\n")
    else:
        text = _text(file) if file.exists() else ""
        _parsed(file, text)
        gap = "\n" if text and not text.endswith("\n\n") else ""
        _replace(file, f"{text}{gap}{entry.toml()}")
        sys.stderr.write(f"added token {entry.id} of {entry.tenant} to {file}\n")
    sys.stdout.write(f"{token}\n")


@app.command(name="list")
def list_(*, file: File) -> None:
    """List the tokens in a file: id, tenant and date.

    Args:
        file: The tokens file.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("id", "tenant", "created"):
        table.add_column(title, no_wrap=True)
    for entry in _parsed(file, _text(file)):
        table.add_row(entry.id, entry.tenant, str(entry.created or ""))
    console().print(table)


@app.command
def revoke(token_id: Annotated[str, Parameter(name="ID")], *, file: File) -> None:
    """Revoke a token: remove it from a file.

    Args:
        token_id: The token's id in `gradwire token list`.
        file: The tokens file.
    """
    from gradwire_server.auth.tokens import without  # noqa: PLC0415 - as above

    text = _text(file)
    _parsed(file, text)
    try:
        _replace(file, without(text, token_id))
    except ValueError as error:
        raise CommandError(f"{file} was not changed: {error}") from None
    sys.stdout.write(f"removed token {token_id} from {file}\n")


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"{file} cannot be read: {_cause(error)}") from None


def _parsed(file: Path, text: str) -> Tokens:
    from gradwire_server.auth.tokens import parse_tokens  # noqa: PLC0415 - as above

    try:
        return parse_tokens(text.encode())
    except ValueError as error:
        raise CommandError(f"{file} is not a tokens file: {error}") from None


def _replace(file: Path, text: str) -> None:
    """Replace the file's contents atomically: a server may be reading it."""
    file = file.resolve()
    try:
        mode = stat.S_IMODE(file.stat().st_mode) if file.exists() else 0o600
        handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        try:
            with os.fdopen(handle, "w") as written:
                written.write(text)
                os.fchmod(written.fileno(), mode)
            Path(name).replace(file)
        except BaseException:
            Path(name).unlink()
            raise
    except OSError as error:
        raise CommandError(f"{file} cannot be written: {_cause(error)}") from None


def _cause(error: OSError | UnicodeDecodeError) -> str:
    text = error.strerror if isinstance(error, OSError) else error.reason
    return text or str(error)
