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
    """A file cannot be used; the text names it and says why."""


class FileUnreadableError(FileError):
    """A file cannot be read now, which may pass though the file stays as it is."""


class WatchedFiles(Generic[T]):
    """What some files say together, loaded again when one of them has changed.

    Whether one has is looked at whenever the value is asked for, in whatever
    thread. That takes microseconds, so that a token that was revoked is refused at
    the next call. New files that cannot be used change nothing but the log. Files
    that cannot be read are tried again each time, because the cause (their owner,
    too many open files) may pass.

    Args:
        paths: The files.
        what: What to call them in the log.
        load: Reads the files, with `read_file`, and makes the value of them.

    Raises:
        FileError: They cannot be used.
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
        """What the files say, or said when they were last right."""
        with self._lock:
            # Before reading: a file that changes meanwhile is read once more.
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
    """A file's content.

    Args:
        path: The file.
        name: What to call it in the error.

    Raises:
        FileUnreadableError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        cause = error.strerror or error
        raise FileUnreadableError(f"{name} cannot be read: {cause}") from None


def watch_file(
    path: Path | str, what: str, parse: Callable[[bytes], T]
) -> WatchedFiles[T]:
    """One watched file.

    Args:
        path: The file.
        what: What to call it.
        parse: Makes the value of its content; raises ValueError with a text that
            is fit for the log.

    Raises:
        FileError: It cannot be used.
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
    """What differs once a file, or who may read it, does; None: there is no file."""
    try:
        found = os.stat(path)  # noqa: PTH116 - looked at at every call
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
