"""Files that may change while the server runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from gradwire_server.errors import CredentialsError

T = TypeVar("T")

_log = logging.getLogger("gradwire_server")


class Watched(Generic[T]):
    """What a file says, read again when it has changed.

    Whether it has is looked at whenever its value is asked for, which takes
    microseconds: a token that was revoked is refused at the next call. A new
    file that cannot be read changes nothing but the log.

    Args:
        path: The file.
        what: What to call it in errors and in the log.
        parse: Makes the value of the file's content; raises ValueError with a
            text that is fit for the log.

    Raises:
        CredentialsError: The file cannot be read, or does not hold what it
            should.
    """

    def __init__(
        self, path: Path | str, what: str, parse: Callable[[bytes], T]
    ) -> None:
        self.path = Path(path)
        self._what = what
        self._parse = parse
        self._seen = self._signature()
        try:
            self._value = parse(self.path.read_bytes())
        except (OSError, ValueError) as error:
            raise CredentialsError(self._complaint(error)) from None

    @property
    def value(self) -> T:
        """What the file says, or said when it was last right."""
        signature = self._signature()
        if signature != self._seen:
            # Before reading: a file that changes meanwhile is read once more.
            self._seen = signature
            self._read_again()
        return self._value

    def _read_again(self) -> None:
        try:
            self._value = self._parse(self.path.read_bytes())
        except (OSError, ValueError) as error:
            _log.error(f"{self._complaint(error)}; what it said before still holds")
        else:
            _log.info(f"{self._what} has changed", extra={"path": str(self.path)})

    def _signature(self) -> tuple[int, int, int] | None:
        try:
            found = os.stat(self.path)  # noqa: PTH116 - at every call
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns

    def _complaint(self, error: OSError | ValueError) -> str:
        if isinstance(error, OSError):
            return f"{self._what} {self.path} cannot be read: {error.strerror or error}"
        return f"{self._what} {self.path} cannot be used: {error}"
