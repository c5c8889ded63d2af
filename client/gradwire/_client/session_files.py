"""Files with a session's tensors, in the safetensors format.

A file has a tensor ``model/NAME`` for each weight, and ``exp_avg/NAME`` or another
state's name for each of its optimizer states. Its metadata has the steps and each
weight's updates. Any safetensors library can read it.
"""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradwire._api.errors import InputError
from gradwire._api.types import Array
from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.optimizers import FORMULAS, STATES

_MODEL = "model"


@dataclass(slots=True)
class SavedTensor:
    """A weight in a file."""

    elements: Array
    compute_dtype: str | None = None
    updates: int = 0
    states: dict[str, Array] = field(default_factory=dict)
    frozen: bool = False

    @property
    def size_bytes(self) -> int:
        """Bytes of the weight and its copy in a session."""
        copy = Dtype.named(self.compute_dtype).itemsize if self.compute_dtype else 0
        return self.elements.nbytes + self.elements.size * copy

    @property
    def states_bytes(self) -> int:
        """Bytes of its states."""
        return sum(each.nbytes for each in self.states.values())


def write(path: str | os.PathLike[str], saved: Mapping[str, SavedTensor]) -> None:
    """Write weights to a file, in one piece: it is complete, or the old one stays.

    Args:
        path: The file.
        saved: The weights, by name.

    Raises:
        InputError: The package safetensors is missing.
        OSError: The file cannot be written.
    """
    numpy_files = _library("safetensors.numpy")
    arrays: dict[str, Array] = {}
    about: dict[str, dict[str, Any]] = {}
    for name, tensor in saved.items():
        arrays[f"{_MODEL}/{name}"] = tensor.elements
        for state, elements in tensor.states.items():
            arrays[f"{state}/{name}"] = elements
        about[name] = {"updates": tensor.updates}
        if tensor.frozen:
            about[name]["frozen"] = True
        if tensor.compute_dtype is not None:
            about[name]["compute_dtype"] = tensor.compute_dtype
    metadata = {"formulas": FORMULAS, "tensors": json.dumps(about)}
    target = Path(path)
    descriptor, beside = tempfile.mkstemp(
        dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"
    )
    os.close(descriptor)
    try:
        numpy_files.save_file(arrays, beside, metadata)
        with Path(beside).open("rb") as file:
            os.fsync(file.fileno())
        Path(beside).replace(target)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def read(path: str | os.PathLike[str]) -> dict[str, SavedTensor]:
    """Return the weights of a file, by name.

    Raises:
        InputError: The package safetensors is missing, or the file has no weights of
            a session.
        OSError: The file cannot be read.
    """
    safetensors = _library("safetensors")
    name = os.fspath(path)
    with Path(path).open("rb"):
        pass  # Raises the usual errors.
    try:
        with safetensors.safe_open(name, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("formulas") == FORMULAS:
                return _read(file, json.loads(metadata["tensors"]))
    except (
        safetensors.SafetensorError,
        ValueError,
        KeyError,
        TypeError,
        RecursionError,  # of nested JSON
    ) as error:
        raise InputError(
            f"{name} is not a session's safetensors file: {error}"
        ) from None
    raise InputError(
        f"{name} was not saved by a session with the formulas {FORMULAS}: put its"
        " tensors one by one"
    )


def _read(file: Any, about: Any) -> dict[str, SavedTensor]:
    if not isinstance(about, dict):
        raise TypeError("its metadata has no mapping of tensors")
    saved = {}
    for name, each in about.items():
        updates = each["updates"]
        if type(updates) is not int or not 0 <= updates < 1 << 64:
            raise ValueError(f"{name} has {updates!r} updates")
        elements = file.get_tensor(f"{_MODEL}/{name}")
        saved[name] = SavedTensor(
            elements,
            each.get("compute_dtype"),
            updates,
            frozen=each.get("frozen") is True,
        )
    for key in file.keys():  # noqa: SIM118 - not a mapping
        kind, _, name = key.partition("/")
        if kind != _MODEL and kind not in STATES:
            continue
        if name not in saved:
            raise ValueError(f"its tensor {key!r} is not in its metadata")
        if kind in STATES:
            saved[name].states[kind] = file.get_tensor(key)
    return saved


def _library(name: str) -> Any:
    """Import the package when it is needed, because it is optional."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(
            "saving and restoring need the package safetensors: pip install"
            " gradwire[safetensors]"
        ) from None
