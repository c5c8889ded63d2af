"""What a saved state of a session has.

A state is the one after a step: the weights, their optimizer states, what is known of
each tensor, and the step. It does not have activations, nor contributions to gradients
since the step: whoever restores it makes the next step from its beginning.

A file is a safetensors file with ``model/NAME`` for each weight, ``exp_avg/NAME`` or
another state's name for each optimizer state, and ``gradient/NAME`` for each gradient
whose sum the step has kept. A weight that has no name of its own has ``#NUMBER`` there.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.limits import MAX_TENSOR_DIMENSIONS
from gradwire_protocol.optimizers import FORMULAS, STATES
from gradwire_protocol.v1 import session_service_pb2 as pb2
from gradwire_server.backends.kept_memory import KeptArray
from gradwire_server.errors import JobError
from gradwire_server.sessions.registry import is_printable
from gradwire_server.sessions.session import MAX_TENSORS
from gradwire_server.sessions.tensor_files import Access, TensorFile, TensorFileError
from gradwire_server.sessions.tensors import KeptTensor

_MODEL, _GRADIENT = "model", "gradient"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A session's state, to be written. Its arrays must not change meanwhile."""

    step: int
    arrays: Mapping[str, KeptArray]
    metadata: Mapping[str, str]


def snapshot(step: int, tensors: Iterable[KeptTensor]) -> Snapshot:
    """Return a session's state.

    Raises:
        JobError: A gradient has contributions beside a sum of earlier steps, which
            cannot be told apart.
    """
    tensors = [each for each in tensors if each.role != pb2.TENSOR_ROLE_ACTIVATION]
    arrays: dict[str, KeptArray] = {}
    about: dict[str, list[dict[str, Any]]] = {_MODEL: [], _GRADIENT: []}
    taken: dict[str, Counter[str]] = {
        kind: Counter(
            each.name for each in tensors if (each.gradient is None) == weight
        )
        for kind, weight in ((_MODEL, True), (_GRADIENT, False))
    }
    for tensor in tensors:
        kind = _MODEL if tensor.gradient is None else _GRADIENT
        key = tensor.name
        if not key or key.startswith("#") or taken[kind][key] > 1:
            key = f"#{tensor.number}"
        header = tensor.header()
        entry: dict[str, Any] = {
            "key": key,
            "number": tensor.number,
            "name": tensor.name,
        }
        if tensor.gradient is None:
            entry["updates"] = tensor.updates
            if tensor.frozen:
                entry["frozen"] = True
            if header.compute_dtype:
                entry["compute_dtype"] = Dtype(header.compute_dtype).label
            arrays[f"{_MODEL}/{key}"] = tensor.array
            for state, elements in tensor.states.items():
                arrays[f"{state}/{key}"] = elements
        else:
            entry |= {"dtype": tensor.dtype.label, "shape": tensor.array.shape}
            if tensor.gradient.carried:
                if tensor.gradient.parts:
                    raise JobError(
                        Reason.STATE_NOT_SAVED,
                        f"gradient {tensor.number} has contributions since the last "
                        f"step, beside a sum that the step kept: save the session "
                        f"right after a step",
                    )
                arrays[f"{_GRADIENT}/{key}"] = tensor.array
        about[kind].append(entry)
    weights = {entry.pop("key"): entry for entry in about[_MODEL]}
    metadata = {
        "formulas": FORMULAS,
        "step": str(step),
        "tensors": json.dumps(weights),
        "gradients": json.dumps(about[_GRADIENT]),
    }
    return Snapshot(step, arrays, metadata)


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor of a saved state."""

    number: int
    name: str
    role: int
    dtype: Dtype
    shape: tuple[int, ...]
    compute: Dtype | None
    updates: int
    elements: str | None
    """Its elements' name in the file; None: it has none."""
    states: Mapping[str, str]
    """The names of its states' elements in the file."""
    size_bytes: int
    """Bytes of the tensor, its copy and its states."""
    frozen: bool = False


class SavedState:
    """A saved state, open for reading.

    Args:
        descriptor: Its file, which belongs to this object.
        fail: Makes the error for a file that is damaged.

    Raises:
        TensorFileError: It is not a saved state, or one of other formulas.
        OSError: It cannot be read.

    Attributes:
        step: The session's steps.
        tensors: Its tensors.
    """

    def __init__(self, descriptor: int, fail: Callable[[str], JobError]) -> None:
        self._descriptor = descriptor
        self._fail = fail
        self._file = TensorFile(descriptor)
        metadata = self._file.metadata
        if metadata.get("formulas") != FORMULAS:
            raise TensorFileError(
                f"was saved with the formulas {str(metadata.get('formulas'))[:64]!r}: "
                f"this server has {FORMULAS}"
            )
        try:
            self.step = int(metadata["step"])
            self.tensors = tuple(self._described(metadata))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise TensorFileError("has a damaged description of its tensors") from None
        numbers = {each.number for each in self.tensors}
        if (
            not 0 <= self.step < 2**64
            or len(numbers) != len(self.tensors)
            or len(numbers) > MAX_TENSORS
        ):
            raise TensorFileError("describes its tensors wrongly")

    @property
    def size_bytes(self) -> int:
        """Bytes that the tensors need in a session."""
        return sum(each.size_bytes for each in self.tensors)

    def read(self, into: Mapping[str, KeptArray], access: Access) -> None:
        """Read all elements.

        Args:
            into: Arrays for all tensors, by the names in the file.
            access: Writes them.

        Raises:
            JobError: The file is damaged. The arrays are then of no use.
        """
        try:
            self._file.read(into, access)
        except TensorFileError as error:
            raise self._fail(str(error)) from None
        except OSError as error:
            raise self._fail(f"cannot be read: {error.strerror}") from None

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _described(self, metadata: Mapping[str, str]) -> Iterator[SavedTensor]:
        places = self._file.places
        left = set(places)
        for key, about in json.loads(metadata["tensors"]).items():
            place = places[f"{_MODEL}/{key}"]
            states = {
                state: f"{state}/{key}" for state in STATES if f"{state}/{key}" in left
            }
            left -= {f"{_MODEL}/{key}", *states.values()}
            compute = about.get("compute_dtype")
            copy = None if compute is None else Dtype.named(compute)
            if copy is not None and (
                place.dtype is not Dtype.FLOAT32 or copy.itemsize != 2
            ):
                raise ValueError(key)
            for state in states.values():
                found = places[state]
                if (found.dtype, found.shape) != (place.dtype, place.shape):
                    raise ValueError(state)
            size = place.size_bytes * (1 + len(states))
            if copy is not None:
                size += place.size_bytes // place.dtype.itemsize * copy.itemsize
            yield _checked(
                SavedTensor(
                    int(about["number"]),
                    str(about["name"]),
                    pb2.TENSOR_ROLE_WEIGHT,
                    place.dtype,
                    place.shape,
                    copy,
                    int(about["updates"]),
                    f"{_MODEL}/{key}",
                    states,
                    size,
                    about.get("frozen", False) is True,
                )
            )
        for about in json.loads(metadata["gradients"]):
            dtype, shape = Dtype.named(about["dtype"]), tuple(about["shape"])
            elements = f"{_GRADIENT}/{about['key']}"
            kept = places.get(elements)
            if kept is not None and (kept.dtype, kept.shape) != (dtype, shape):
                raise ValueError(elements)
            left.discard(elements)
            size = math.prod(shape) * dtype.itemsize
            yield _checked(
                SavedTensor(
                    int(about["number"]),
                    str(about["name"]),
                    pb2.TENSOR_ROLE_GRADIENT,
                    dtype,
                    shape,
                    None,
                    0,
                    None if kept is None else elements,
                    {},
                    size,
                )
            )
        if left:
            raise ValueError(left)


def _checked(tensor: SavedTensor) -> SavedTensor:
    if not (
        0 < tensor.number < 2**32
        and 0 <= tensor.updates < 2**64
        and is_printable(tensor.name)
        and len(tensor.shape) <= MAX_TENSOR_DIMENSIONS
        and all(type(each) is int and each >= 0 for each in tensor.shape)
    ):
        raise ValueError(tensor.number)
    return tensor
