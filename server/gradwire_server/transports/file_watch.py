"""Files that may change while the server runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from gradwire_server.errors import CredentialsError
from gradwire_server.files import Stamp, stamp

T = TypeVar("T")

_log = logging.getLogger("gradwire_server")


class Watched(Generic[T]):
    """What a file says, read again when it has changed.

    Whether it has is looked at whenever its value is asked for, which takes
    microseconds: a token that was revoked is refused at the next call. A new
    file that cannot be used changes nothing but the log; one that cannot be read
    is tried again at every call, because what keeps it from that (its owner, too
    many open files) may pass.

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
        self._complained: str | None = None
        self._seen = stamp(self.path)
        try:
            self._value = parse(self.path.read_bytes())
        except (OSError, ValueError) as error:
            raise CredentialsError(self._complaint(error)) from None

    @property
    def value(self) -> T:
        """What the file says, or said when it was last right."""
        # Before reading: a file that changes meanwhile is read once more.
        now = stamp(self.path)
        if now != self._seen:
            self._read_again(now)
        return self._value

    def _read_again(self, now: Stamp) -> None:
        try:
            content = self.path.read_bytes()
            self._seen = now
            self._value = self._parse(content)
        except (OSError, ValueError) as error:
            complaint = self._complaint(error)
            if complaint != self._complained:
                self._complained = complaint
                _log.error(f"{complaint}; what it said before still holds")
        else:
            self._complained = None
            _log.info(f"{self._what} has changed", extra={"path": str(self.path)})

    def _complaint(self, error: OSError | ValueError) -> str:
        if isinstance(error, OSError):
            return f"{self._what} {self.path} cannot be read: {error.strerror or error}"
        return f"{self._what} {self.path} cannot be used: {error}"
