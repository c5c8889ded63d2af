"""What `verify=` means: how thoroughly results are checked on the client."""

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
"""Columns of a group of a 16-bit result, as long as there are no more groups."""


@dataclass(frozen=True, slots=True)
class Verify:
    """How results are checked: by Freivalds' random vectors, row by row.

    Each round deals a result's columns out to groups and adds up those of a
    group with random signs; the same sums are computed from the operands in
    O(m n + n k + m k). docs/gradients.md says what is caught.

    Raises:
        InputError: A value is out of its range; the text names the field.

    Example:
        >>> finer = gradwire.Verify(groups=64)
        >>> client = gradwire.connect("gpu-node:50051", verify=finer)
    """

    rounds: int = 2
    """Independent random vectors, 1 to 1024. Errors in one row that happen to
    cancel each other in one of them do not in the next."""

    groups: int | None = None
    """Parts of a row that are added up separately, 1 to 1024; the fewer
    elements in one, the smaller the error that stands out from their rounding.
    The check's time grows with `rounds` times `groups`. None: 16, and for
    results of 16 bits, which are rounded most, up to 64."""

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
                    f"Verify's {name} is {value!r}: give a whole number from 1 to"
                    f" {_MOST}"
                )

    def groups_for(self, columns: int, dtype: Dtype) -> int:
        """Groups of a result of so many columns, of that dtype."""
        if self.groups is not None:
            return self.groups
        if not dtype.is_narrow:
            return _GROUPS
        return min(_NARROW_GROUPS, max(_GROUPS, -(-columns // _NARROW_COLUMNS)))


VerifyLike: TypeAlias = Verify | bool | int | None


def parse_verify(value: VerifyLike) -> Verify | None:
    """How results shall be checked; None: as the client's others.

    `Verify` with the fields' defaults for True, with so many rounds for a
    number. False stays false: not at all.

    Raises:
        InputError: It is none of these.
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
        f"verify is {value!r}: give True, False, a number of rounds or a"
        " gradwire.Verify"
    )


class _Not(Verify):
    """No check, where a client's others are checked."""

    __slots__ = ()

    def __bool__(self) -> bool:
        return False


NOT = _Not()
"""What `verify=False` means."""
