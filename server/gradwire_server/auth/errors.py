"""The error of refused credentials."""

from __future__ import annotations


class RefusedError(Exception):
    """Invalid credentials.

    Args:
        told: Text for the client. It never contains any of the credentials.
        why: Text for the log.
    """

    def __init__(
        self, told: str = "the credentials are not valid here", why: str = ""
    ) -> None:
        super().__init__(told)
        self.told = told
        self.why = why or told
