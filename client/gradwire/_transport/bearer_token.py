"""The bearer token that authenticates the client."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeAlias

from gradwire._api.errors import InputError
from gradwire._api.options import (
    MAX_METADATA_BYTES,
    TRACE_KEYS,
    MetadataPairs,
    check_metadata_size,
    metadata_bytes,
)

TokenLike: TypeAlias = "str | Callable[[], str]"
"""A token, or a function that returns one for each call."""

HEADER = "authorization"

_BEARER = re.compile(r"[A-Za-z0-9\-._~+/]+=*")
"""Syntax of a bearer token (RFC 6750, section 2.1)."""


class Token:
    """A client's token. Only the server ever sees it.

    Args:
        given: As for `connect`.

    Raises:
        InputError: The token is invalid. The message does not contain it.
    """

    def __init__(self, given: TokenLike) -> None:
        self._given = given
        if not callable(given):
            _checked(given, "token")

    def __repr__(self) -> str:
        return "<a token>"

    def added_to(self, metadata: MetadataPairs) -> MetadataPairs:
        """Return a call's metadata with the current token.

        Raises:
            InputError: The token's function returned no token, or the caller's
                metadata has another one.
        """
        if any(key == HEADER for key, _ in metadata):
            raise InputError(
                f"metadata has {HEADER}, but the client has a token: expected only one"
                " of them"
            )
        if callable(self._given):
            now = _checked(self._given(), "what token() returned")
        else:
            now = self._given
        whole = (*metadata, (HEADER, f"Bearer {now}"))
        if metadata_bytes(whole) > MAX_METADATA_BYTES:
            # A call is not to fail because it is traced.
            whole = tuple(pair for pair in whole if pair[0] not in TRACE_KEYS)
        check_metadata_size(whole)
        return whole


class Authorized:
    """A method of the service with the token in the metadata of each call.

    Args:
        method: The method of a synchronous or asynchronous gRPC channel.
        token: The token.
    """

    def __init__(self, method: Any, token: Token) -> None:
        self._method = method
        self._token = token

    def __call__(
        self, request: Any = None, *, timeout: Any = None, metadata: MetadataPairs = ()
    ) -> Any:
        """Call the method."""
        return self._method(
            request, timeout=timeout, metadata=self._token.added_to(tuple(metadata))
        )

    def future(
        self, request: Any, *, timeout: Any = None, metadata: MetadataPairs = ()
    ) -> Any:
        """Call the method without waiting for the response."""
        return self._method.future(
            request, timeout=timeout, metadata=self._token.added_to(tuple(metadata))
        )


def _checked(token: object, name: str) -> str:
    if not isinstance(token, str):
        raise InputError(
            f"{name} is a {type(token).__name__}: expected a string, or a function"
            " that returns one"
        )
    if not _BEARER.fullmatch(token):
        raise InputError(
            f"{name} is not a bearer token: expected letters, digits and - . _ ~ + /,"
            " without spaces and line breaks"
        )
    return token
