"""The items of a stream's rows, as the caller gives them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from gradwire._api.errors import InputError

END_OF_ROWS: Final = object()
"""Stands behind the last item."""


def iterate_rows(rows: object) -> Iterator[object]:
    """The caller's items.

    Raises:
        InputError: `rows` cannot be iterated.
    """
    if isinstance(rows, Iterable):
        return iter(rows)
    raise InputError(
        f"rows is a {type(rows).__qualname__}, which cannot be iterated: give pairs"
        " (x_rows, dy_rows)"
    )
