"""How a command says that it cannot go on."""

from __future__ import annotations

import enum


class ExitStatus(enum.IntEnum):
    """What the process ends with."""

    OK = 0
    FAILED = 1
    """The command did not get to its end, or found what it looked for wrong."""
    USAGE = 2
    """The command was called wrongly: flags, variables, keys of a file."""
    NOT_CHECKED = 3
    """``gradwire check`` found no server that it could check."""


class CommandError(Exception):
    """A command cannot go on; the text is a sentence for who called it."""

    def __init__(self, text: str, status: ExitStatus = ExitStatus.FAILED) -> None:
        super().__init__(text)
        self.status = status
