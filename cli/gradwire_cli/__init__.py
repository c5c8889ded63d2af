"""The command line: ``gradwire serve``, ``compute``, ``check`` and others.

It knows both sides, which know nothing of it. It needs the extra ``cli``, or
``server``, which is enough for all of it.
"""

from __future__ import annotations

import importlib.util
import signal
import sys

from gradwire_cli.terminal.signals import Interrupted, signals_raise
from gradwire_cli.terminal.streams import open_closed

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
                    "gradwire: the command line is not installed; install it with: "
                    "pip install 'gradwire[cli]', or 'gradwire[server]' to serve\n"
                )
                return 1
            # Not at the top: the line above must come out where these are missing.
            from gradwire_cli.app import run  # noqa: PLC0415

            return run(sys.argv[1:])
    except Interrupted as interrupted:
        sys.stderr.write(f"gradwire: {interrupted}\n")
        return interrupted.status
    except KeyboardInterrupt:  # before signals were taken care of
        sys.stderr.write("gradwire: interrupted\n")
        return 128 + signal.SIGINT
