"""One log line for each call, with structured fields."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

_log = logging.getLogger("gradwire_server")


def write_access_log(level: int, fields: Mapping[str, Any]) -> None:
    """Write the log line of a finished call."""
    _log.log(level, "job", extra=dict(fields))


def access_log_enabled(level: int) -> bool:
    """Return whether lines of this level are logged."""
    return _log.isEnabledFor(level)
