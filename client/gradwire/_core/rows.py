"""The caller's items of a stream's rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from gradwire._api.errors import InputError

END_OF_ROWS: Final = object()
"""Marks the end of the items."""


def iterate_rows(rows: object) -> Iterator[object]:
    """Return an iterator of the caller's items.

    Raises:
        InputError: `rows` cannot be iterated.
    """
    if isinstance(rows, Iterable):
        return iter(rows)
    raise InputError(
        f"rows is a {type(rows).__qualname__}: expected an iterable of pairs"
        " (x_rows, dy_rows)"
    )
