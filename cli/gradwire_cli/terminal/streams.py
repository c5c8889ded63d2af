"""Standard streams that are closed, or that cannot encode every character."""

from __future__ import annotations

import io
import os
import sys


def open_closed() -> None:
    """Open replacements for closed standard streams.

    Python sets a closed stream to None, and the next opened file or socket would
    get its descriptor. Writes to standard output still fail, as in other
    programs. Writes to standard error are lost.
    """
    if sys.stdin is None:
        sys.stdin = os.fdopen(os.open(os.devnull, os.O_RDONLY))
    if sys.stdout is None:
        # Opened for reading, so that writes fail as they should.
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_RDONLY), "w")
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")


def replace_unencodable() -> None:
    """Write ``?`` for characters that the terminal's encoding does not have."""
    for stream in sys.stdout, sys.stderr:
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")
