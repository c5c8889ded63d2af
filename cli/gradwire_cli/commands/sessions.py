"""``gradwire sessions``."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, TypeVar

from cyclopts import App, Parameter
from rich.table import Table

import gradwire
from gradwire_cli.options import (
    DEFAULT_ADDRESS,
    FLAG,
    PLAINTEXT,
    Address,
    Seconds,
    SecurityOptions,
)
from gradwire_cli.terminal.tables import console
from gradwire_cli.terminal.units import format_bytes

app = App(
    name="sessions",
    help="""
    List, describe, save or close the sessions of a server, and list or delete saved
    states.

    A session keeps a training run's weights, gradients and optimizer state on the
    server. Only sessions of your own tenant are shown; without authentication all
    callers are one tenant.
    """,
)

_TENSOR_COLUMNS = (
    "number",
    "name",
    "role",
    "shape",
    "dtype",
    "size",
    "updates",
    "states",
)
_TEXTS = {"session", "label", "name", "role", "shape", "dtype", "states"}
"""Columns that are not numbers."""
_COLUMNS = ("session", "label", "device", "step", "tensors", "used", "kept", "idle")


@app.command(name="list")
def list_sessions(
    *,
    address: Address = DEFAULT_ADDRESS,
    security: SecurityOptions = PLAINTEXT,
    as_json: Annotated[bool, FLAG, Parameter(name="--json")] = False,
    timeout: Seconds = 10.0,
) -> None:
    """List the open sessions, the oldest first.

    Args:
        address: Server address: HOST:PORT or unix:PATH.
        security: TLS and credentials.
        as_json: Print one JSON object for each session instead of a table.
        timeout: Time limit for the answer.
    """
    with _connected(address, security, timeout) as client:
        found = client.sessions()
    _print_list(
        found,
        _COLUMNS,
        lambda each: (
            each.id,
            each.label,
            str(each.device),
            str(each.step),
            str(each.tensors),
            format_bytes(each.used_bytes),
            format_bytes(each.keep_bytes),
            f"{each.idle_s:.0f} of {each.lease_s:.0f} s",
        ),
        as_json=as_json,
        if_none="no session is open",
    )


@app.command
def describe(
    session: str,
    /,
    *,
    address: Address = DEFAULT_ADDRESS,
    security: SecurityOptions = PLAINTEXT,
    as_json: Annotated[bool, FLAG, Parameter(name="--json")] = False,
    timeout: Seconds = 10.0,
) -> None:
    """Print a session's state and its tensors. It does not renew the session's lease.

    Args:
        session: Session, as listed.
        address: Server address: HOST:PORT or unix:PATH.
        security: TLS and credentials.
        as_json: Print one JSON object instead of a table.
        timeout: Time limit for the answer.
    """
    with _connected(address, security, timeout) as client:
        found = client.describe_session(session)
    if as_json:
        _print_json(found)
        return
    used, kept = format_bytes(found.used_bytes), format_bytes(found.keep_bytes)
    label = f" ({found.label})" if found.label else ""
    sys.stdout.write(
        f"{session}{label} on device {found.device.index}, {found.device.name}:"
        f" {found.step} steps, {used} of {kept} used, lease of {found.lease_s:g} s\n"
    )
    if found.tensors:
        _print_table(
            _TENSOR_COLUMNS,
            (
                (
                    str(each.number),
                    each.name,
                    "frozen" if each.frozen else each.role,
                    " x ".join(map(str, each.shape)),
                    each.dtype,
                    format_bytes(each.size_bytes),
                    str(each.updates),
                    ", ".join(each.states),
                )
                for each in found.tensors
            ),
        )


@app.command
def close(
    ids: Annotated[tuple[str, ...], Parameter(name="session", negative=())],
    /,
    *,
    address: Address = DEFAULT_ADDRESS,
    security: SecurityOptions = PLAINTEXT,
    timeout: Seconds = 10.0,
) -> None:
    """Close sessions and free their memory. Their clients get an error.

    Args:
        ids: Sessions, as listed.
        address: Server address: HOST:PORT or unix:PATH.
        security: TLS and credentials.
        timeout: Time limit for each answer.
    """
    with _connected(address, security, timeout) as client:
        for each in ids:
            client.close_session(each)
            sys.stdout.write(f"{each} is closed\n")


@app.command
def save(
    session: str,
    name: str,
    /,
    *,
    address: Address = DEFAULT_ADDRESS,
    security: SecurityOptions = PLAINTEXT,
    timeout: Seconds = 60.0,
) -> None:
    """Save a session's state on its server, as it is after its last step.

    Its client goes on; a later session can be opened with the state.

    Args:
        session: Session, as listed.
        name: Name of the state: letters, digits, ".", "_" or "-".
        address: Server address: HOST:PORT or unix:PATH.
        security: TLS and credentials.
        timeout: Time limit for the answer.
    """
    with _connected(address, security, timeout) as client:
        step = client.save_session(session, name)
    sys.stdout.write(f"{session} is saved as {name}, after {step} steps\n")


@app.command(name="saved")
def list_saved(
    *,
    address: Address = DEFAULT_ADDRESS,
    security: SecurityOptions = PLAINTEXT,
    as_json: Annotated[bool, FLAG, Parameter(name="--json")] = False,
    timeout: Seconds = 10.0,
) -> None:
    """List the saved states, in the order of their names.

    Args:
        address: Server address: HOST:PORT or unix:PATH.
        security: TLS and credentials.
        as_json: Print one JSON object for each state instead of a table.
        timeout: Time limit for the answer.
    """
    with _connected(address, security, timeout) as client:
        found = client.saved_states()
    _print_list(
        found,
        ("name", "step", "size", "saved"),
        lambda each: (
            each.name,
            "damaged" if each.step is None else str(each.step),
            format_bytes(each.size_bytes),
            f"{each.age_s:.0f} s ago",
        ),
        as_json=as_json,
        if_none="no state is saved",
    )


@app.command
def delete(
    names: Annotated[tuple[str, ...], Parameter(name="name", negative=())],
    /,
    *,
    address: Address = DEFAULT_ADDRESS,
    security: SecurityOptions = PLAINTEXT,
    timeout: Seconds = 10.0,
) -> None:
    """Delete saved states. Sessions that were opened with them go on.

    Args:
        names: Names of states, as listed by saved.
        address: Server address: HOST:PORT or unix:PATH.
        security: TLS and credentials.
        timeout: Time limit for each answer.
    """
    with _connected(address, security, timeout) as client:
        for each in names:
            client.delete_saved_state(each)
            sys.stdout.write(f"{each} is deleted\n")


Item = TypeVar("Item", gradwire.SessionSummary, gradwire.SavedState)


def _print_list(
    found: Sequence[Item],
    columns: Sequence[str],
    row: Callable[[Item], tuple[str, ...]],
    *,
    as_json: bool,
    if_none: str,
) -> None:
    """Print what a server has: a table, a sentence if it is empty, or JSON objects."""
    if as_json:
        for each in found:
            _print_json(each)
        return
    if not found:
        sys.stdout.write(f"{if_none}\n")
        return
    _print_table(columns, map(row, found))


def _print_json(item: gradwire.SessionInfo | Item) -> None:
    json.dump(dataclasses.asdict(item), sys.stdout)
    sys.stdout.write("\n")


def _print_table(columns: Sequence[str], rows: Iterable[tuple[str, ...]]) -> None:
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name in _TEXTS else "right")
    for row in rows:
        table.add_row(*row)
    console().print(table)


def _connected(
    address: str | None, security: SecurityOptions, timeout: float
) -> gradwire.Client:
    return gradwire.connect(
        address or DEFAULT_ADDRESS,
        connect_timeout_s=timeout,
        timeout_s=timeout,
        tls=security.wanted,
        token=security.token,
    )
