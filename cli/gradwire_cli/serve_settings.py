"""Settings of ``gradwire serve``: flag, then variable, then file, then default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, ArgumentCollection, CycloptsError, Parameter, Token
from cyclopts.config import Env, Toml

from gradwire_cli.errors import CommandError, ExitStatus
from gradwire_cli.terminal.units import parse_bytes
from gradwire_server.settings import Settings


def _to_bytes(_: object, tokens: Sequence[Token]) -> int:
    return parse_bytes(tokens[0].value)


def _to_numbers(_: object, tokens: Sequence[Token]) -> tuple[int, ...]:
    texts = [text for token in tokens for text in token.value.split(",")]
    try:
        return tuple(int(text) for text in texts)
    except ValueError:
        given = ",".join(texts)
        raise CommandError(
            f"devices is {given!r}: expected numbers like 0,2", ExitStatus.USAGE
        ) from None


_SIZE = Parameter(
    converter=_to_bytes,
    metavar="SIZE",
)
_SECONDS = Parameter(metavar="SECONDS")
_FILE = Parameter(metavar="FILE")
_NAME = Parameter(metavar="NAME")


@dataclass(frozen=True)
class ServeSettings(Settings):
    """`Settings` with their command-line forms.

    `Settings` documents the fields; their docstrings are the help texts.
    """

    listen: Annotated[
        tuple[str, ...],
        Parameter(metavar="ADDRESS", negative=(), show_default=" ".join),
    ] = Settings.listen
    backend: Annotated[str, _NAME] = Settings.backend
    devices: Annotated[
        tuple[int, ...],
        Parameter(
            converter=_to_numbers, metavar="NUMBERS", negative=(), show_default=False
        ),
    ] = Settings.devices
    device_memory_limit: Annotated[int | None, _SIZE] = Settings.device_memory_limit
    memory_limit: Annotated[int | None, _SIZE] = Settings.memory_limit
    block_bytes: Annotated[int | None, _SIZE] = Settings.block_bytes
    auth_tokens: Annotated[Path | None, _FILE] = Settings.auth_tokens
    auth_jwks: Annotated[Path | None, _FILE] = Settings.auth_jwks
    auth_jwt_audience: Annotated[str | None, _NAME] = Settings.auth_jwt_audience
    auth_jwt_issuer: Annotated[str | None, _NAME] = Settings.auth_jwt_issuer
    auth_jwt_claim: Annotated[str, _NAME] = Settings.auth_jwt_claim
    tenant_memory_limit: Annotated[int | None, _SIZE] = Settings.tenant_memory_limit
    idle_timeout: Annotated[float, _SECONDS] = Settings.idle_timeout
    grace: Annotated[float, _SECONDS] = Settings.grace

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except ValueError as error:
            raise CommandError(str(error), ExitStatus.USAGE) from None


class _SettingsFile(Toml):
    def _load_config(self, path: Path) -> dict[str, Any]:
        try:
            return super()._load_config(path)
        except (ValueError, RecursionError) as error:
            raise CycloptsError(msg=f"{path} is not a TOML file: {error}") from error
        except OSError as error:
            raise CycloptsError(msg=_unreadable(path, error)) from error


def _from_file(
    app: App, commands: tuple[str, ...], arguments: ArgumentCollection
) -> None:
    """Read the ``--config`` file for settings not given as flag or variable."""
    (config,) = (argument for argument in arguments if argument.name == "--config")
    if not config.tokens:
        return
    path = Path(config.tokens[0].value)
    file = _SettingsFile(path, must_exist=True, use_commands_as_keys=False)
    try:
        file(app, commands, arguments)
    except FileNotFoundError as error:
        raise CycloptsError(msg=_unreadable(path, error)) from error
    except (ValueError, RecursionError) as error:
        # Valid TOML with thousands of digits or nested tables.
        raise CycloptsError(msg=f"{path} has no valid settings: {error}") from error


def _unreadable(path: Path, error: OSError) -> str:
    return f"{path} cannot be read: {error.strerror or error}"


SOURCES = (Env("GRADWIRE_", command=False), _from_file)
"""Sources of settings besides the command line, highest priority first."""
