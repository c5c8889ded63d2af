"""The token that proves to a server on whose behalf it is called."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeAlias

from gradwire._api.errors import InputError
from gradwire._api.options import MetadataPairs

TokenLike: TypeAlias = "str | Callable[[], str]"
"""A token, or what gives one whenever a call begins."""

HEADER = "authorization"

_BEARER = re.compile(r"[A-Za-z0-9\-._~+/]+=*")
"""What a bearer token may be made of (RFC 6750, section 2.1)."""


class Token:
    """A client's token, which shows itself to nobody but the server.

    Args:
        given: As for `connect`.

    Raises:
        InputError: It is no token; the text does not repeat it.
    """

    def __init__(self, given: TokenLike) -> None:
        self._given = given
        if not callable(given):
            _checked(given, "token")

    def __repr__(self) -> str:
        return "<a token>"

    def added_to(self, metadata: MetadataPairs) -> MetadataPairs:
        """A call's metadata, with the token as it is now.

        Raises:
            InputError: What gives the token gave none, or the caller's own
                metadata has another.
        """
        if any(key == HEADER for key, _ in metadata):
            raise InputError(
                f"metadata holds {HEADER}, and the client was given a token: give one"
                " of them"
            )
        if callable(self._given):
            now = _checked(self._given(), "what token() returned")
        else:
            now = self._given
        return (*metadata, (HEADER, f"Bearer {now}"))


class Authorized:
    """A method of the service, each call of which has the token.

    Args:
        method: The method, as gRPC's channels of either kind make it.
        token: Asked for at each call.
    """

    def __init__(self, method: Any, token: Token) -> None:
        self._method = method
        self._token = token

    def __call__(
        self, request: Any = None, *, timeout: Any = None, metadata: MetadataPairs = ()
    ) -> Any:
        """Call it."""
        return self._method(
            request, timeout=timeout, metadata=self._token.added_to(tuple(metadata))
        )

    def future(
        self, request: Any, *, timeout: Any = None, metadata: MetadataPairs = ()
    ) -> Any:
        """Call it, and do not wait."""
        return self._method.future(
            request, timeout=timeout, metadata=self._token.added_to(tuple(metadata))
        )


def _checked(token: object, name: str) -> str:
    if not isinstance(token, str):
        raise InputError(
            f"{name} is a {type(token).__name__}: give a string, or what returns one"
        )
    if not _BEARER.fullmatch(token):
        raise InputError(
            f"{name} is no bearer token: those are of letters, digits and - . _ ~ + /"
            " alone, with no space or line break"
        )
    return token
