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
from typing import Annotated

from cyclopts import App, Parameter

from gradwire_cli.errors import CommandError, ExitStatus
from gradwire_cli.serve_settings import SOURCES, ServeSettings
from gradwire_cli.terminal.logs import LogSettings
from gradwire_protocol.version import VERSION

_log = logging.getLogger("gradwire_server.cli")

_DEFAULTS = ServeSettings()
_DEFAULT_LOG = LogSettings()

app = App(
    name="serve",
    help="""
    Run a server.

    When it is ready it says so in one line on standard output: the addresses
    it listens on, what computes, and why. Everything else goes to the log on
    standard error. Ctrl-C and SIGTERM let running jobs finish; the second one
    stops at once.
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
        settings: What the server is like.
        log: What its log is like.
        config: A TOML file with any of these settings (max-jobs = 8). Flags
            come before variables, and variables before the file.
    """
    del config  # read by SOURCES, before this runs
    log.configure()
    asyncio.run(_serve(settings))


async def _serve(settings: ServeSettings) -> None:
    # Not at the top: --help and usage errors need none of it.
    from gradwire_server import (  # noqa: PLC0415
        BackendError,
        CredentialsError,
        ListenError,
        Server,
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
    except (ListenError, BackendError, CredentialsError) as error:
        raise CommandError(str(error)) from error
    try:
        _say_ready(server.addresses, f"{server.backend_name}: {server.backend_reason}")
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
    """Ends the process if it has not ended by then.

    What waits for a device that is lost may wait for ever, in a thread that
    nobody can stop, and whoever is to start the server again waits for its end.
    """

    def end() -> None:
        _log.critical("the process does not end, and is ended")
        os._exit(ExitStatus.FAILED)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


_LOST_S = 5.0
"""Seconds for jobs to tell their clients, and threads to end."""


def _say_ready(addresses: tuple[str, ...], backend: str) -> None:
    where = ", ".join(addresses)
    sys.stdout.write(f"gradwire {VERSION} serves on {where} ({backend})\n")
    sys.stdout.flush()
