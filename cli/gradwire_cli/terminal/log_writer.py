"""A log handler that never makes the server wait for the reader of its log."""

from __future__ import annotations

import atexit
import logging
import os
import queue
import threading

MAX_ENTRIES = 10_000
"""Most entries that wait to be written; at some 300 bytes each, 3 MB."""

_FLUSH_S = 2.0
"""Time for the last entries at the end of the process, seconds."""


class LogWriter(logging.Handler):
    """Writes entries to a file descriptor in a thread of its own.

    If nothing reads the other end (a full pipe, a stopped terminal), entries wait
    in a bounded queue, and further entries are dropped. Once the reader is back,
    an entry tells how many were dropped.

    Args:
        descriptor: The file descriptor. It stays open.
        max_entries: Most entries that wait.
    """

    def __init__(self, descriptor: int, max_entries: int = MAX_ENTRIES) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._waiting: queue.Queue[logging.LogRecord | None] = queue.Queue(max_entries)
        self._dropped = 0
        self._counting = threading.Lock()
        # A daemon: it may be blocked in write(2) for ever.
        self._thread = threading.Thread(
            target=self._write_all, name="gradwire-log", daemon=True
        )
        self._thread.start()
        atexit.register(self.close)

    def emit(self, record: logging.LogRecord) -> None:
        """Queue an entry, or drop and count it."""
        try:
            self._waiting.put_nowait(record)
        except queue.Full:
            self._drop()

    def close(self) -> None:
        """Write what waits, for at most 2 seconds, and end."""
        atexit.unregister(self.close)
        try:
            self._waiting.put(None, timeout=_FLUSH_S)
        except queue.Full:
            return
        self._thread.join(_FLUSH_S)
        super().close()

    def _write_all(self) -> None:
        while (record := self._waiting.get()) is not None:
            self._write(record)
            # Told once the reader has caught up, not between two drops.
            if self._dropped and self._waiting.empty():
                self._tell_dropped()
        if self._dropped:
            self._tell_dropped()

    def _tell_dropped(self) -> None:
        with self._counting:
            dropped, self._dropped = self._dropped, 0
        self._write(_dropped_entry(dropped))

    def _write(self, record: logging.LogRecord) -> None:
        try:
            rest = memoryview(f"{self.format(record)}\n".encode(errors="replace"))
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except Exception:  # noqa: BLE001 - the reader is gone, or a bad entry
            self._drop()

    def _drop(self) -> None:
        with self._counting:
            self._dropped += 1


def _dropped_entry(count: int) -> logging.LogRecord:
    record = logging.LogRecord(
        "gradwire_server.log",
        logging.WARNING,
        __file__,
        0,
        "log entries were dropped: standard error was not read fast enough",
        (),
        None,
    )
    record.dropped = count
    return record
