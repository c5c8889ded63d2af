"""Errors and exit statuses of the commands."""

from __future__ import annotations

import enum


class ExitStatus(enum.IntEnum):
    """Exit status of the process."""

    OK = 0
    FAILED = 1
    """The command failed, or a check failed."""
    USAGE = 2
    """Usage error: invalid flag, variable, or key of a settings file."""
    NOT_CHECKED = 3
    """``gradwire check`` could not check any server."""


class CommandError(Exception):
    """A command failed; the text is a sentence for the user."""

    def __init__(self, text: str, status: ExitStatus = ExitStatus.FAILED) -> None:
        super().__init__(text)
        self.status = status
