"""Why a caller is not known."""

from __future__ import annotations


class RefusedError(Exception):
    """Credentials that are not good.

    Args:
        told: What their bearer is told. It never holds any of them.
        why: What the log says beside it.
    """

    def __init__(
        self, told: str = "the credentials are not valid here", why: str = ""
    ) -> None:
        super().__init__(told)
        self.told = told
        self.why = why or told
