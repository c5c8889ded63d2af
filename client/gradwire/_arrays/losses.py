"""What a conversion to a NumPy array would lose: masks, missing values, units.

NumPy converts masked arrays, tables with missing values and quantities to plain
numbers without a word. The numbers under a mask (often 1e20) and numbers of mixed
units would then be multiplied as if they were ordinary.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np

from gradwire._api.errors import InputError

_PLAIN = frozenset({float, int, bool, np.float64, np.float32, np.float16})


def check(value: object, name: str) -> None:
    """Check an object before it is converted to an array.

    Raises:
        InputError: A conversion would lose a mask, missing values or a unit.
    """
    if type(value) is np.ndarray:
        return
    if isinstance(value, list | tuple):
        _check_items(value, name)
    elif _is_masked(value):
        raise InputError(
            f"{name} is a masked array with masked elements, and the server has no"
            f" masks: fill it first, for a NumPy array with {name}.filled(...)"
        )
    elif missing := _missing(value):
        raise InputError(
            f"{name} has {missing} missing values, and the server has none: fill"
            " them first"
        )
    elif unit := _unit(value):
        raise InputError(
            f"{name} has the unit {unit}, and results would have none: pass its plain"
            f" numbers, for example {name}.value or {name}.magnitude"
        )


def _check_items(items: Sequence[object], name: str) -> None:
    # Lists of numbers are long: their types are gathered in C.
    if _PLAIN.issuperset(map(type, items)):
        return
    kinds = set(map(type, items))
    if kinds <= {list, tuple}:
        nested: Iterator[object] = chain.from_iterable(items)  # type: ignore[arg-type]
        if _PLAIN.issuperset(map(type, nested)):
            return
    for item in items:
        check(item, name)
        # Read when it is converted: only the array tells of a mask.
        if hasattr(item, "__array__") and not isinstance(item, np.ndarray | np.generic):
            try:
                array = np.asanyarray(item)
            except Exception:  # noqa: BLE001, S112 - whoever converts it reports that
                continue
            check(array, name)


def _is_masked(value: object) -> bool:
    if isinstance(value, np.ma.MaskedArray):  # np.ma.masked, too
        return bool(np.ma.is_masked(value))
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        mask = getattr(value, "_masked_mask", None)  # of torch.masked.MaskedTensor
        return mask is not None and not bool(mask.all())
    return False


def _missing(value: Any) -> int:
    """Missing values of a table of PyArrow or Polars, which become NaN."""
    try:
        if (arrow := sys.modules.get("pyarrow")) is not None:
            if isinstance(value, arrow.Table | arrow.RecordBatch):
                return sum(column.null_count for column in value.columns)
            if isinstance(value, arrow.Array | arrow.ChunkedArray):
                return int(value.null_count)
        if (polars := sys.modules.get("polars")) is not None:
            if isinstance(value, polars.DataFrame):
                return int(np.asarray(value.null_count()).sum())
            if isinstance(value, polars.Series):
                return int(value.null_count())
    except AttributeError:  # a module that is being imported
        return 0
    return 0


def _unit(value: object) -> str:
    """The unit of a quantity of Astropy, unyt or Pint; empty without one."""
    for attribute in "unit", "units":
        unit = getattr(value, attribute, None)
        # A method, or text in the metadata of a file, makes no quantity.
        if unit is None or callable(getattr(unit, "__func__", None)):
            continue
        if type(unit).__module__.partition(".")[0] in {"astropy", "unyt", "pint"}:
            text = str(unit)
            return "" if text == "dimensionless" else text
    return ""
