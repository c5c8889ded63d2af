"""``gradwire serve``."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from gradwire_cli.errors import CommandError, ExitStatus
from gradwire_cli.serve_settings import SOURCES, ServeSettings
from gradwire_cli.terminal.logs import LogSettings
from gradwire_protocol.version import VERSION

if TYPE_CHECKING:
    from gradwire_server import Server

_log = logging.getLogger("gradwire_server.cli")

_DEFAULTS = ServeSettings()
_DEFAULT_LOG = LogSettings()

app = App(
    name="serve",
    help="""
    Run a server.

    When the server is ready, it prints one line on standard output: its
    addresses, the backend, and the reason for that backend. The log goes to
    standard error. Ctrl-C or SIGTERM lets running jobs finish; a second signal
    stops the server at once.
    """,
    config=SOURCES,
)


@app.default
def serve(
    *,
    settings: Annotated[ServeSettings, Parameter(name="*")] = _DEFAULTS,
    log: Annotated[LogSettings, Parameter(name="*")] = _DEFAULT_LOG,
    config: Annotated[Path | None, Parameter(metavar="FILE")] = None,
) -> None:
    """Run a server.

    Args:
        settings: Settings of the server.
        log: Settings of the log.
        config: TOML file with any of these settings (max-jobs = 8). Flags
            override variables, and variables override the file.
    """
    del config  # read by SOURCES, before this runs
    # The log comes before the sentence that says why the server has ended.
    with contextlib.closing(log.configure()):
        asyncio.run(_serve(settings))


async def _serve(settings: ServeSettings) -> None:
    # Imported here: --help and usage errors do not need the server.
    from gradwire_server import (  # noqa: PLC0415
        BackendError,
        CredentialsError,
        ListenError,
        Server,
        StateDirectoryError,
        TracesError,
    )

    asked, insisted = asyncio.Event(), asyncio.Event()

    def on_signal(name: str) -> None:
        if asked.is_set():
            insisted.set()
            return
        _log.info("asked to stop; another signal stops at once", extra={"by": name})
        asked.set()

    loop = asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, on_signal, signum.name)
    try:
        server = Server(settings)
        await server.start()
    except (
        ListenError,
        BackendError,
        CredentialsError,
        StateDirectoryError,
        TracesError,
    ) as error:
        raise CommandError(str(error)) from error
    try:
        _say_ready(server)
    except OSError:
        await server.stop()
        raise
    waits = [asyncio.create_task(each) for each in (asked.wait(), server.wait_lost())]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    if server.lost is not None:
        _end_by_force_after(_LOST_S)
    draining = asyncio.create_task(server.drain())
    insisting = asyncio.create_task(insisted.wait())
    await asyncio.wait({draining, insisting}, return_when=asyncio.FIRST_COMPLETED)
    insisting.cancel()
    draining.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await draining
    for wait in waits:
        wait.cancel()
    if server.lost is not None:
        raise CommandError(server.lost)


def _end_by_force_after(seconds: float) -> None:
    """Exit the process after `seconds` if it is still running.

    A thread waiting for a lost device may wait forever and cannot be stopped, and
    the supervisor restarts the server only after the process ends.
    """

    def end() -> None:
        _log.critical("the process does not stop: exiting now")
        os._exit(ExitStatus.FAILED)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


_LOST_S = 5.0
"""Seconds for jobs to report to their clients, and for threads to end."""


def _say_ready(server: Server) -> None:
    where = ", ".join(server.addresses)
    backend = f"{server.backend_name}: {server.backend_reason}"
    beside = f", metrics on {server.metrics_url}" if server.metrics_url else ""
    beside += f", health on {server.health_address}" if server.health_address else ""
    sys.stdout.write(f"gradwire {VERSION} serves on {where} ({backend}){beside}\n")
    sys.stdout.flush()
