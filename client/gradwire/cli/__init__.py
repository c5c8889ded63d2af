"""The command line: ``gradwire serve``, ``compute``, ``check`` and others.

It needs the extra ``cli``, and ``gradwire serve`` the extra ``server`` too.
"""

from __future__ import annotations

import importlib.util
import signal
import sys

from gradwire.cli._interrupts import Interrupted, signals_raise
from gradwire.cli._streams import open_closed

__all__ = ["main"]

_NEEDS = ("cyclopts", "rich")


def main() -> int:
    """Run the command that the process was started with.

    Returns:
        The exit status: 0 when the command did what it says, 1 when it
        failed, 2 when it was called wrongly, 128 and the number of the
        signal when one ended it (130 after Ctrl-C).
    """
    try:
        open_closed()
        with signals_raise():
            if any(importlib.util.find_spec(name) is None for name in _NEEDS):
                sys.stderr.write(
                    "gradwire: the command line is not installed; "
                    "install it with: pip install 'gradwire[cli]'\n"
                )
                return 1
            # Not at the top: the line above must come out where these are missing.
            from gradwire.cli._app import run  # noqa: PLC0415

            return run(sys.argv[1:])
    except Interrupted as interrupted:
        sys.stderr.write(f"gradwire: {interrupted}\n")
        return interrupted.status
    except KeyboardInterrupt:  # before signals were taken care of
        sys.stderr.write("gradwire: interrupted\n")
        return 128 + signal.SIGINT
