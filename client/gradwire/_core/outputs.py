"""The destinations of results: the caller's arrays, or new arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradwire._api.errors import InputError
from gradwire._api.types import Array
from gradwire._arrays.buffer_pool import ResultPool
from gradwire._arrays.device_copy import (
    HostCopies,
    dtype_name,
    is_cupy_array,
    is_on_device,
    is_torch_tensor,
    to_device,
)
from gradwire._arrays.operand import Operand, Source, as_numpy
from gradwire._arrays.result_library import ResultLibrary
from gradwire._core.job_plan import Plan
from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.matrices import DEFAULT_RESULTS, Matrix

_OVERLAP_WORK = 10_000
"""NumPy's work limit for deciding whether two strided arrays share an element."""


@dataclass(frozen=True, slots=True)
class Output:
    """The destination of one wanted result."""

    handed_back: Any
    """The object returned to the caller: its own array, or a new one."""

    array: Array
    """The array in host memory that is written, with the operands' leading
    dimensions."""


def named_outputs(out: Any, results: Sequence[Matrix]) -> dict[Matrix, Any]:
    """Return the arrays of `out` by result.

    Args:
        out: None, a mapping from names, a tuple or list with an entry for
            every one of `results` that is a default one (None: make one), or,
            where there is only one result, that array itself.
        results: What the method returns.

    Raises:
        InputError: `out` has none of these forms.
    """
    if out is None:
        return {}
    entries = [matrix for matrix in results if matrix in DEFAULT_RESULTS]
    names = ", ".join(matrix.label for matrix in entries)
    if isinstance(out, Mapping):
        by_name = {matrix.label: matrix for matrix in results}
        for name in out:
            if name not in by_name:
                raise InputError(f"out has {name!r}; it can have {', '.join(by_name)}")
        given = {by_name[name]: value for name, value in out.items()}
    elif isinstance(out, tuple | list):
        if len(out) != len(entries):
            raise InputError(
                f"out has {len(out)} entries: expected {len(entries)} ({names}), with"
                " None for arrays to be created"
            )
        given = dict(zip(entries, out, strict=True))
    elif len(results) == 1:
        given = {results[0]: out}
    else:
        raise InputError(
            f"out is a {type(out).__qualname__}: expected a mapping such as"
            f' {{"{results[0].label}": array}}, or a tuple of {names}'
        )
    return {matrix: value for matrix, value in given.items() if value is not None}


def given_outputs(
    plan: Plan,
    operands: Mapping[Matrix, Operand] | Mapping[Matrix, Source],
    given: Mapping[Matrix, Any],
    shapes: Mapping[Matrix, tuple[int, ...]],
) -> dict[Matrix, Output]:
    """Check the caller's arrays for results.

    Args:
        plan: The job.
        operands: The operands.
        given: The caller's arrays.
        shapes: The shapes of the results.

    Raises:
        InputError: An array cannot hold its result, or shares memory with an operand
            or with another array of `out`.
    """
    for matrix in given:
        if matrix not in plan.results:
            raise InputError(f"out has {matrix.label}, which is not in results")
    checked: dict[Matrix, Output] = {}
    for matrix in plan.results:
        if matrix in given:
            dtype = plan.array_dtype(matrix)
            array = _checked(given[matrix], matrix.label, shapes[matrix], dtype)
            for other, output in checked.items():
                if output.handed_back is given[matrix]:
                    raise InputError(
                        f"out's {matrix.label} shares memory with out's {other.label}"
                    )
            checked[matrix] = Output(given[matrix], array)
    _check_overlap({m: output.array for m, output in checked.items()}, operands)
    return checked


class ArrayOutputs:
    """The arrays of a job's results: the caller's, or arrays created when needed.

    Args:
        plan: The job.
        shapes: The shapes of the results.
        given: The caller's arrays.
        memory: Allocates the other arrays.
        library: The library of the other arrays; None: NumPy.
    """

    def __init__(
        self,
        plan: Plan,
        shapes: Mapping[Matrix, tuple[int, ...]],
        given: Mapping[Matrix, Output],
        memory: ResultPool,
        library: ResultLibrary | None = None,
    ) -> None:
        self._library = library
        self._given = frozenset(given)
        self._plan = plan
        self._shapes = shapes
        self._memory = memory
        self._outputs = dict(given)

    def present(self) -> dict[Matrix, Array]:
        """Return the arrays that exist already."""
        return {matrix: output.array for matrix, output in self._outputs.items()}

    def all(self) -> dict[Matrix, Array]:
        """Return the arrays of all results, and create missing arrays."""
        for matrix in self._plan.results:
            if matrix not in self._outputs:
                dtype = self._plan.array_dtype(matrix).numpy
                array = self._memory.empty(self._shapes[matrix], dtype)
                self._outputs[matrix] = Output(array, array)
        return self.present()

    def hand_back(self, matrix: Matrix, elements: Array) -> None:
        """Use an array of elements as a result that has no array yet."""
        array = elements.reshape(self._shapes[matrix])
        self._outputs[matrix] = Output(array, array)

    def deliver(self, copies: HostCopies) -> None:
        """Make the objects for the caller: in a GPU's memory, or of a library."""
        for matrix, output in self._outputs.items():
            if matrix not in self._given:
                if self._library is not None:
                    made = self._library.converted(output.array, copies)
                    self._outputs[matrix] = Output(made, output.array)
            elif is_on_device(output.handed_back):
                with copies.copying():
                    to_device(output.array, output.handed_back)
                copies.size_bytes += output.array.nbytes

    def results(self, wanted: Iterable[Matrix]) -> list[Any]:
        """Return the objects for the caller; None for unwanted results."""
        made = self._outputs
        return [made[each].handed_back if each in made else None for each in wanted]


def output_shapes(
    plan: Plan, operands: Mapping[Matrix, Operand]
) -> dict[Matrix, tuple[int, ...]]:
    """Return the shapes of the results, with the leading dimensions of the operands."""
    return {matrix: output_shape(plan, operands, matrix) for matrix in plan.results}


def output_shape(
    plan: Plan, operands: Mapping[Matrix, Operand], matrix: Matrix
) -> tuple[int, ...]:
    """Shape of a result, with the leading dimensions of its operand."""
    if matrix.is_sum:
        return plan.shape(matrix, 0)[matrix.is_vector :]
    lead = operands[matrix.needs[0]].lead
    return (*lead, matrix.row_length(plan.n, plan.k))


def _checked(value: Any, name: str, shape: tuple[int, ...], dtype: Dtype) -> Array:
    if is_torch_tensor(value) and value.requires_grad:
        raise InputError(
            f"out's {name} requires grad, but results are written without autograd:"
            " pass its .detach()"
        )
    if isinstance(value, np.ma.MaskedArray):
        raise InputError(f"out's {name} is a masked array: pass its .data")
    if is_torch_tensor(value) and value.device.type == "meta":
        raise InputError(f"out's {name} is on the meta device, which has no memory")
    if not (
        isinstance(value, np.ndarray) or is_torch_tensor(value) or is_cupy_array(value)
    ):
        raise InputError(
            f"out's {name} is a {type(value).__qualname__}: expected a NumPy array, a"
            " PyTorch tensor or a CuPy array"
        )
    if is_on_device(value):
        return _room_for_device(value, name, shape, dtype)
    array = as_numpy(value, f"out's {name}")
    _check_shape(array, name, shape)
    if is_torch_tensor(value) and array.size and array.ctypes.data != value.data_ptr():
        # A pending negation, a wrapper: PyTorch has made a copy to be read.
        raise InputError(
            f"out's {name} has no memory that shows its elements as they are, and a"
            f" result would be written to a copy: pass {name}.resolve_neg() or another"
            " plain tensor"
        )
    if not np.can_cast(dtype.numpy, array.dtype, "equiv"):
        raise InputError(
            f"out's {name} is {array.dtype}: expected {dtype.label}; to change that,"
            f' set result_dtype={{"{name}": ...}}'
        )
    if not array.flags.writeable:
        raise InputError(f"out's {name} is read-only")
    if _overlaps_itself(array):
        raise InputError(f"out's {name} overlaps itself: elements share memory")
    return array


def _room_for_device(
    value: Any, name: str, shape: tuple[int, ...], dtype: Dtype
) -> Array:
    """Return host memory for a result that is later copied to a GPU."""
    _check_shape(value, name, shape)
    if dtype_name(value) != dtype.label:
        raise InputError(
            f"out's {name} is {dtype_name(value)}: expected {dtype.label}; to change"
            f' that, set result_dtype={{"{name}": ...}}'
        )
    return np.empty(shape, dtype.numpy)


def _check_shape(value: Any, name: str, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        given = tuple(value.shape)
        raise InputError(f"out's {name} has shape {given}: expected {shape}")


def _overlaps_itself(array: Array) -> bool:
    """Return whether two elements may share memory.

    They do not if each stride is at least the extent of the dimensions with smaller
    strides. That holds for every slice, transpose and reshape of an ordinary array.
    """
    if not array.size:
        return False
    steps = sorted(
        (abs(stride), length)
        for length, stride in zip(array.shape, array.strides, strict=True)
        if length > 1
    )
    extent = array.itemsize
    for stride, length in steps:
        if stride < extent:
            return True
        extent += (length - 1) * stride
    return False


def _check_overlap(
    given: Mapping[Matrix, Array],
    operands: Mapping[Matrix, Operand] | Mapping[Matrix, Source],
) -> None:
    taken: list[tuple[str, Array]] = [
        (matrix.label, value.array) for matrix, value in operands.items()
    ]
    for matrix, array in given.items():
        for name, other in taken:
            if _overlap(array, other):
                raise InputError(
                    f"out's {matrix.label} shares memory with {name}, which is read"
                    " while results are written"
                    if name in {operand.label for operand in operands}
                    else f"out's {matrix.label} shares memory with {name}"
                )
        taken.append((f"out's {matrix.label}", array))


def _overlap(one: Array, other: Array) -> bool:
    if not np.may_share_memory(one, other):
        return False
    try:
        work: Any = _OVERLAP_WORK  # NumPy's stubs allow two values only
        return bool(np.shares_memory(one, other, max_work=work))
    except np.exceptions.TooHardError:
        return True
