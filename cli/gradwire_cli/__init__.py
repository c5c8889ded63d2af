"""The command line: ``gradwire serve``, ``compute``, ``check`` and others.

The command line imports the SDK and the server; neither imports it. It needs the
extra ``cli``. The extra ``server`` includes ``cli`` and adds ``gradwire serve``.
"""

from __future__ import annotations

import importlib.util
import signal
import sys

from gradwire_cli.terminal.signals import Interrupted, signals_raise
from gradwire_cli.terminal.streams import open_closed, replace_unencodable

__all__ = ["main"]

_NEEDS = ("cyclopts", "rich")


def main() -> int:
    """Run the command in the process's arguments.

    Returns:
        The exit status: 0 for success, 1 for a failure, 2 for a usage error, 128
        plus the signal's number after a signal (130 after Ctrl-C).
    """
    try:
        open_closed()
        replace_unencodable()
        with signals_raise():
            if any(importlib.util.find_spec(name) is None for name in _NEEDS):
                sys.stderr.write(
                    "gradwire: the command line is not installed; install it with: "
                    "pip install 'gradwire[cli]', or 'gradwire[server]' to serve\n"
                )
                return 1
            # Imported here: the message above must appear without these packages.
            from gradwire_cli.app import run  # noqa: PLC0415

            return run(sys.argv[1:])
    except Interrupted as interrupted:
        sys.stderr.write(f"gradwire: {interrupted}\n")
        return interrupted.status
    except KeyboardInterrupt:  # before the signal handlers were installed
        sys.stderr.write("gradwire: interrupted\n")
        return 128 + signal.SIGINT
