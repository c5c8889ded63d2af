"""Settings of ``gradwire serve``: flag, then variable, then file, then default."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, ArgumentCollection, CycloptsError, Parameter, Token
from cyclopts.config import Dict, Env

from gradwire_cli.errors import CommandError, ExitStatus
from gradwire_cli.options import to_count
from gradwire_cli.terminal.units import parse_bytes
from gradwire_cli.variables import SETTINGS, hint
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


_COUNT = Parameter(converter=to_count)
_SIZE = Parameter(
    converter=_to_bytes,
    metavar="SIZE",
)
_SECONDS = Parameter(metavar="SECONDS")
_FILE = Parameter(metavar="FILE")
_DIRECTORY = Parameter(metavar="DIR")
_NAME = Parameter(metavar="NAME")
_ADDRESS = Parameter(metavar="ADDRESS")


@dataclass(frozen=True)
class ServeSettings(Settings):
    """`Settings` with their command-line forms.

    `Settings` documents the fields; their docstrings are the help texts.
    """

    listen: Annotated[
        tuple[str, ...],
        Parameter(metavar="ADDRESS", negative=(), show_default=" ".join),
    ] = Settings.listen
    data_listen: Annotated[str, _ADDRESS] = Settings.data_listen
    data_advertise: Annotated[str | None, _ADDRESS] = Settings.data_advertise
    metrics_listen: Annotated[str | None, _ADDRESS] = Settings.metrics_listen
    health_listen: Annotated[str | None, _ADDRESS] = Settings.health_listen
    backend: Annotated[str, _NAME] = Settings.backend
    devices: Annotated[
        tuple[int, ...],
        Parameter(
            converter=_to_numbers, metavar="NUMBERS", negative=(), show_default=False
        ),
    ] = Settings.devices
    device_memory_limit: Annotated[int | None, _SIZE] = Settings.device_memory_limit
    memory_limit: Annotated[int | None, _SIZE] = Settings.memory_limit
    keep_limit: Annotated[int | None, _SIZE] = Settings.keep_limit
    session_lease_max: Annotated[float, _SECONDS] = Settings.session_lease_max
    state_dir: Annotated[Path | None, _DIRECTORY] = Settings.state_dir
    row_block_bytes: Annotated[int | None, _SIZE] = Settings.row_block_bytes
    auth_tokens: Annotated[Path | None, _FILE] = Settings.auth_tokens
    auth_jwks: Annotated[Path | None, _FILE] = Settings.auth_jwks
    auth_jwt_audience: Annotated[str | None, _NAME] = Settings.auth_jwt_audience
    auth_jwt_issuer: Annotated[str | None, _NAME] = Settings.auth_jwt_issuer
    auth_jwt_claim: Annotated[str, _NAME] = Settings.auth_jwt_claim
    max_jobs: Annotated[int, _COUNT] = Settings.max_jobs
    max_queue: Annotated[int, _COUNT] = Settings.max_queue
    cpu_threads: Annotated[int | None, _COUNT] = Settings.cpu_threads
    cpu_niceness: Annotated[int, _COUNT] = Settings.cpu_niceness
    tenant_max_jobs: Annotated[int | None, _COUNT] = Settings.tenant_max_jobs
    tenant_max_queue: Annotated[int | None, _COUNT] = Settings.tenant_max_queue
    tenant_memory_limit: Annotated[int | None, _SIZE] = Settings.tenant_memory_limit
    tenant_keep_limit: Annotated[int | None, _SIZE] = Settings.tenant_keep_limit
    tenant_max_sessions: Annotated[int | None, _COUNT] = Settings.tenant_max_sessions
    idle_timeout: Annotated[float, _SECONDS] = Settings.idle_timeout
    grace: Annotated[float, _SECONDS] = Settings.grace

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except ValueError as error:
            raise CommandError(str(error), ExitStatus.USAGE) from None


def _loaded(path: Path) -> dict[str, Any]:
    """Load a TOML file, every key of which is a setting.

    Raises:
        CycloptsError: The file cannot be read, or has a key that is not a setting.
    """
    try:
        with path.open("rb") as file:
            config = tomllib.load(file)
    except (ValueError, RecursionError) as error:
        raise CycloptsError(msg=f"{path} is not a TOML file: {error}") from error
    except OSError as error:
        raise CycloptsError(
            msg=f"{path} cannot be read: {error.strerror or error}"
        ) from error
    known = [name.replace("_", "-") for name in SETTINGS]
    given: dict[str, str] = {}
    for key, value in config.items():
        name = key.replace("-", "_")
        if name in SETTINGS:
            if name in given:
                raise CycloptsError(
                    msg=f"{path} has both {given[name]} and {key}: give one of them"
                )
            given[name] = key
        elif isinstance(value, dict):
            inner = "".join(f".{each}" for each in list(value)[:1])
            raise CycloptsError(
                msg=f"{path} has an unknown key: {key}{inner}; settings stand at the "
                f"top of the file, not in a table"
            )
        else:
            meant = hint(key.replace("_", "-"), known)
            raise CycloptsError(msg=f"{path} has an unknown key: {key}{meant}")
    return config


def _from_file(
    app: App, commands: tuple[str, ...], arguments: ArgumentCollection
) -> None:
    """Read the ``--config`` file for settings not given as flag or variable."""
    (config,) = (argument for argument in arguments if argument.name == "--config")
    if not config.tokens:
        return
    path = Path(config.tokens[0].value)
    file = Dict(_loaded(path), source=str(path), use_commands_as_keys=False)
    try:
        file(app, commands, arguments)
    except (ValueError, RecursionError) as error:
        # Valid TOML with thousands of digits or nested tables.
        raise CycloptsError(msg=f"{path} has no valid settings: {error}") from error


SOURCES = (Env("GRADWIRE_", command=False), _from_file)
"""Sources of settings besides the command line, highest priority first."""
