"""One log line for each call, with what is known of it as fields."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

_log = logging.getLogger("gradwire_server")


def write_access_log(level: int, fields: Mapping[str, Any]) -> None:
    """Writes the line of a call that has ended."""
    _log.log(level, "job", extra=dict(fields))


def access_log_enabled(level: int) -> bool:
    """Whether a line of that level is written at all."""
    return _log.isEnabledFor(level)
