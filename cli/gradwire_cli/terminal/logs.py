"""Settings and format of the log of ``gradwire serve``."""

from __future__ import annotations

import importlib.util
import logging
import sys
from dataclasses import dataclass
from typing import Literal

from gradwire_cli.errors import CommandError
from gradwire_cli.terminal.log_writer import LogWriter


@dataclass(frozen=True)
class LogSettings:
    """The log, on standard error."""

    log_format: Literal["auto", "json", "console"] = "auto"
    """One JSON object a line (json), readable lines (console), or console on a
    terminal and json elsewhere (auto)."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Minimum severity of logged entries. The line of each job is info."""

    def configure(self) -> LogWriter:
        """Send the server's log to standard error in this format.

        Returns:
            The handler; closing it writes what waits.

        Raises:
            CommandError: structlog (extra ``server``) is not installed.
        """
        if importlib.util.find_spec("structlog") is None:
            raise CommandError(
                "the server is not installed; install it with: "
                "pip install 'gradwire[server]'"
            )
        on_terminal = sys.stderr.isatty()
        as_json = self.log_format == "json" or (
            self.log_format == "auto" and not on_terminal
        )
        handler = LogWriter(sys.stderr.fileno())
        handler.setFormatter(_formatter(as_json=as_json, colors=on_terminal))
        logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
        logging.getLogger("gradwire_server").setLevel(self.log_level.upper())
        return handler


def _formatter(*, as_json: bool, colors: bool) -> logging.Formatter:
    # Imported here: structlog comes with the extra `server`, not with `cli`.
    import structlog  # noqa: PLC0415
    from structlog.typing import Processor  # noqa: PLC0415

    # Entries come from the standard library's logging, with fields in `extra`;
    # structlog formats them.
    incoming: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    outgoing: list[Processor] = (
        [
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(default=str),
        ]
        if as_json
        else [structlog.dev.ConsoleRenderer(colors=colors)]
    )
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=incoming,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            *outgoing,
        ],
    )
