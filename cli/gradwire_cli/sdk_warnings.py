"""What the SDK warns of, for commands that show it in their own way."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def noted(note: Callable[[logging.LogRecord], None]) -> Iterator[None]:
    """Call `note` with what the SDK warns of, instead of printing it.

    Args:
        note: Called with each warning, in the thread that warns.
    """
    log, handler = logging.getLogger("gradwire"), _Noting(note)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


class _Noting(logging.Handler):
    def __init__(self, note: Callable[[logging.LogRecord], None]) -> None:
        super().__init__(logging.WARNING)
        self._note = note

    def emit(self, record: logging.LogRecord) -> None:
        self._note(record)
