"""``gradwire info``."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import Annotated

from cyclopts import App, Parameter

import gradwire
from gradwire import Device, ServerInfo, ServerLimits
from gradwire._transport.address import is_local
from gradwire_cli.errors import CommandError
from gradwire_cli.options import (
    DEFAULT_ADDRESS,
    FLAG,
    PLAINTEXT,
    Address,
    Seconds,
    SecurityOptions,
)
from gradwire_cli.terminal.tables import console, properties
from gradwire_cli.terminal.units import format_bytes
from gradwire_protocol.limits import DIRECT

app = App(name="info", help="Show a server's version, devices, features and limits.")


@app.default
def info(
    *,
    address: Address = DEFAULT_ADDRESS,
    security: SecurityOptions = PLAINTEXT,
    as_json: Annotated[bool, FLAG, Parameter(name="--json")] = False,
    timeout: Seconds = 10.0,
) -> None:
    """Show a server's version, devices, features and limits.

    Args:
        address: Server address: HOST:PORT or unix:PATH.
        security: TLS and credentials.
        as_json: Print one JSON object instead of a table.
        timeout: Time limit for the answer.
    """
    address = address or DEFAULT_ADDRESS
    try:
        with gradwire.connect(
            address,
            connect_timeout_s=timeout,
            tls=security.wanted,
            token=security.token,
        ) as client:
            answer = client.server_info()
    except gradwire.ConnectError as error:
        if is_local(address) and str(error).startswith("nothing listens"):
            raise CommandError(f"{error}; gradwire serve starts a server") from error
        raise
    if as_json:
        json.dump({"address": address, **dataclasses.asdict(answer)}, sys.stdout)
        sys.stdout.write("\n")
    else:
        console().print(properties(_rows(address, answer)))


def _device(device: Device) -> str:
    parts = [
        f"{device.backend} {device.index}: {device.name}",
        format_bytes(device.memory_bytes),
    ]
    if device.memory_limit_bytes:
        parts.append(f"{format_bytes(device.memory_limit_bytes)} of it for jobs")
    if device.compute_capability:
        parts.append(f"compute capability {device.compute_capability}")
    return ", ".join(parts)


def _sessions(limits: ServerLimits) -> str:
    if not limits.max_keep_bytes:
        return "none"
    return (
        f"{limits.max_sessions} at once, of at most"
        f" {format_bytes(limits.max_keep_bytes)}, leases of at most"
        f" {limits.max_lease_s:g} s"
    )


def _rows(address: str, info: ServerInfo) -> Iterator[tuple[str, str]]:
    limits = info.limits
    yield "server", f"{address} (instance {info.server_instance})"
    yield "version", f"gradwire {info.version}, contract {info.contract}"
    yield "state", "draining, accepts no new jobs" if info.draining else "accepts jobs"
    for device in info.devices:
        yield "device", _device(device)
    yield "backend reason", info.backend_reason
    yield "dtypes", ", ".join(info.dtypes)
    yield "memory for jobs", format_bytes(limits.memory_bytes)
    yield "jobs", f"{limits.max_jobs} at once, {limits.max_queue} more in the queue"
    if limits.row_block_bytes:  # as old as what says how many run
        yield "jobs now", f"{info.running_jobs} run, {info.queued_jobs} wait"
        yield "row blocks", f"{format_bytes(limits.row_block_bytes)} of operands"
    yield "largest n and k", f"{limits.max_columns:,}"
    yield "largest message", format_bytes(limits.max_message_bytes)
    yield "sent before Accepted", format_bytes(limits.early_bytes)
    yield "idle timeout", f"{limits.idle_timeout_s:g} s"
    yield "sessions", _sessions(limits)
    yield "direct connections", "yes" if DIRECT in info.features else "no"
    yield "features", ", ".join(info.features) or "none beyond the contract"
    yield "libraries", ", ".join(f"{k} {v}" for k, v in info.libraries.items())
