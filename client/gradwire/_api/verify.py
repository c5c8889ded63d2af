"""The option `verify`: how thoroughly the client checks results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from gradwire._api.errors import InputError
from gradwire_protocol.dtypes import Dtype

_MOST = 1024

_GROUPS = 16

_NARROW_GROUPS = 64
_NARROW_COLUMNS = 16
"""Columns of a group of a 16-bit result, up to `_NARROW_GROUPS` groups."""


@dataclass(frozen=True, slots=True)
class Verify:
    """Settings of the check of results, by Freivalds' algorithm, row by row.

    Each round divides a result's columns into random groups and sums each group with
    random signs. The client computes the same sums from the operands, in O(m n + n k +
    m k). docs/gradients.md describes which errors are found.

    Raises:
        InputError: A value is out of range; the message names the field.

    Example:
        >>> finer = gradwire.Verify(groups=64)
        >>> client = gradwire.connect("gpu-node:50051", verify=finer)
    """

    rounds: int = 2
    """Number of independent random vectors, 1 to 1024. Errors in one row that cancel
    out in one round do not cancel out in the next."""

    groups: int | None = None
    """Number of groups of a row, 1 to 1024. With fewer elements in a group, smaller
    errors are found. The time of the check grows with `rounds` times `groups`. None:
    16; up to 64 for 16-bit results, which are rounded most."""

    def __post_init__(self) -> None:
        for name in ("rounds", "groups"):
            value = getattr(self, name)
            if name == "groups" and value is None:
                continue
            if (
                isinstance(value, bool)
                or not isinstance(value, int | np.integer)
                or not 1 <= value <= _MOST
            ):
                raise InputError(
                    f"Verify's {name} is {value!r}: expected an integer from 1 to"
                    f" {_MOST}"
                )

    def groups_for(self, columns: int, dtype: Dtype) -> int:
        """Return the number of groups for a result of `columns` columns."""
        if self.groups is not None:
            return self.groups
        if not dtype.is_narrow:
            return _GROUPS
        return min(_NARROW_GROUPS, max(_GROUPS, -(-columns // _NARROW_COLUMNS)))


VerifyLike: TypeAlias = Verify | bool | int | None


def parse_verify(value: VerifyLike) -> Verify | None:
    """Return the settings for a value of `verify`; None: the client's default.

    True gives `Verify` with its defaults, a number gives that many rounds, and False
    gives `NOT`, which is falsy.

    Raises:
        InputError: The value is none of these.
    """
    if value is None or isinstance(value, Verify):
        return value
    if value is False:
        return NOT
    if value is True:
        return Verify()
    if isinstance(value, int | np.integer):
        return Verify(rounds=int(value))
    raise InputError(
        f"verify is {value!r}: expected True, False, a number of rounds or a"
        " gradwire.Verify"
    )


class _Not(Verify):
    """No check, even if the client's default is to check."""

    __slots__ = ()

    def __bool__(self) -> bool:
        return False


NOT = _Not()
"""Settings for `verify=False`."""
