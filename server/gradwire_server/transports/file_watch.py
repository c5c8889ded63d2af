"""Files that may change while the server runs."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeAlias, TypeVar

T = TypeVar("T")

_log = logging.getLogger("gradwire_server")

Signature: TypeAlias = "tuple[int, ...] | None"


class FileError(ValueError):
    """A file cannot be used; the text names it and the cause."""


class FileUnreadableError(FileError):
    """A file cannot be read now; a retry may succeed although the file is unchanged."""


class WatchedFiles(Generic[T]):
    """A value loaded from files, and loaded again when one of the files changes.

    Each access to the value checks the files, in any thread. The check takes
    microseconds, so a revoked token is refused at the next call. If the new files are
    invalid, the value stays and the error is logged. Files that cannot be read are
    tried again at each access, because the cause (their owner, too many open files) may
    pass.

    Args:
        paths: The files.
        what: Their name in the log.
        load: Reads the files with `read_file`, and returns the value.

    Raises:
        FileError: The files cannot be used.
    """

    def __init__(self, paths: Sequence[Path], what: str, load: Callable[[], T]) -> None:
        self._paths = paths
        self._what = what
        self._load = load
        self._lock = threading.Lock()
        self._last_error: str | None = None
        self._seen = self._signatures()
        self._value = load()

    @property
    def value(self) -> T:
        """The value of the files, as they last were valid."""
        with self._lock:
            # Before reading: a file that changes meanwhile is read again.
            now = self._signatures()
            if now != self._seen:
                self._load_again(now)
            return self._value

    def _load_again(self, now: list[Signature]) -> None:
        try:
            self._value = self._load()
        except FileError as error:
            if not isinstance(error, FileUnreadableError):
                self._seen = now
            if str(error) != self._last_error:
                self._last_error = str(error)
                _log.error(
                    f"{self._what} cannot be reloaded; what was loaded before stays in "
                    f"effect",
                    extra={"error": str(error)},
                )
        else:
            self._seen, self._last_error = now, None
            _log.info(f"reloaded {self._what}")

    def _signatures(self) -> list[Signature]:
        return [file_signature(path) for path in self._paths]


def read_file(path: Path, name: str) -> bytes:
    """Return a file's content.

    Args:
        path: The file.
        name: Its name in the error.

    Raises:
        FileUnreadableError: The file cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        cause = error.strerror or error
        raise FileUnreadableError(f"{name} cannot be read: {cause}") from None


def watch_file(
    path: Path | str, what: str, parse: Callable[[bytes], T]
) -> WatchedFiles[T]:
    """Watch one file.

    Args:
        path: The file.
        what: Its name in the log.
        parse: Returns the value of the content; raises ValueError with a text for the
            log.

    Raises:
        FileError: The file cannot be used.
    """
    path = Path(path)

    def load() -> T:
        content = read_file(path, f"{what} {path}")
        try:
            return parse(content)
        except ValueError as error:
            raise FileError(f"{what} {path} cannot be used: {error}") from None

    return WatchedFiles([path], what, load)


def file_signature(path: Path) -> Signature:
    """Return a value that changes with a file or its access; None if it is missing."""
    try:
        found = os.stat(path)  # noqa: PTH116 - runs at every call
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
