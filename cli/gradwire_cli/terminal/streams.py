"""Standard streams that whoever started the process had closed."""

from __future__ import annotations

import os
import sys


def open_closed() -> None:
    """Put something in the place of standard streams that are closed.

    Python has None for them, and the next file or socket that is opened would
    get their number. What is written to standard output still fails, as it
    does in other programs; what is said on standard error is lost.
    """
    if sys.stdin is None:
        sys.stdin = os.fdopen(os.open(os.devnull, os.O_RDONLY))
    if sys.stdout is None:
        # Opened for reading, so that writing is the error that it should be.
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_RDONLY), "w")
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
