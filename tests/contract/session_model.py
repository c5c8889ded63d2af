"""What calls do to a session: a reference, read off the contract alone.

A call that succeeds does what `put`, `drop`, `job` or `step` does here; a call that
fails changes nothing. What jobs compute and steps update is not computed here: it is
given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gradwire.v1 import job_pb2
from gradwire.v1 import session_service_pb2 as pb2
from tests.support.raw import DTYPES, NEEDS, dtype_number

NUMBERS = {dtype_number(name): dtype for name, dtype in DTYPES.items()}
WEIGHT, GRADIENT, ACTIVATION = (
    pb2.TENSOR_ROLE_WEIGHT,
    pb2.TENSOR_ROLE_GRADIENT,
    pb2.TENSOR_ROLE_ACTIVATION,
)
OPERANDS = ("x", "w", "dy")


@dataclass
class Kept:
    """A tensor."""

    role: int
    array: np.ndarray
    copy: int = 0
    """Its compute dtype."""
    name: str = ""
    states: dict[str, np.ndarray] = field(default_factory=dict)
    updates: int = 0
    kept_at: int = 0
    added: int = 0
    """Parts that are in the sum."""
    early: dict[int, np.ndarray] = field(default_factory=dict)
    """Parts that wait for others."""
    expected: int = 0
    """How many parts there are to be; 0: not known."""
    empty: bool = False
    """For a gradient: whether nothing is in the sum."""

    @property
    def size_bytes(self) -> int:
        copy = self.array.size * NUMBERS[self.copy].itemsize if self.copy else 0
        return self.array.nbytes + copy + sum(s.nbytes for s in self.states.values())

    @property
    def early_bytes(self) -> int:
        return sum(part.nbytes for part in self.early.values())

    @property
    def parts(self) -> list[int]:
        return [*range(self.added), *sorted(self.early)]

    @property
    def is_complete(self) -> bool:
        expected = self.expected or self.added
        return not self.early and (not self.added or self.added == expected)

    def add(self, part: int, parts: int, elements: np.ndarray) -> bool:
        """A part comes; whether it had come before."""
        if part in self.parts:
            return True
        self.expected = parts
        self.early[part] = elements
        while (due := self.early.pop(self.added, None)) is not None:
            with np.errstate(all="ignore"):
                self.array = due if self.empty else self.array + due
            self.empty = False
            self.added += 1
        return False

    def next_step(self, *, keep: bool) -> None:
        """The parts of the next step begin."""
        if not keep or self.empty:
            self.empty = True
            self.array = np.zeros_like(self.array)
        self.added = self.expected = 0
        self.early.clear()


class SessionModel:
    """A session.

    Args:
        keep_bytes: Its memory.
    """

    def __init__(self, keep_bytes: int) -> None:
        self.keep_bytes = keep_bytes
        self.step = 0
        self.tensors: dict[int, Kept] = {}
        self.spare: dict[int, Kept] = {}
        """What was used up: a repeated job may find it."""
        self.last: tuple[bytes, pb2.StepResponse] | None = None
        """The last step."""

    @property
    def used_bytes(self) -> int:
        return sum(each.size_bytes + each.early_bytes for each in self.tensors.values())

    def described(self, without: Iterable[int] = ()) -> dict[str, Any]:
        """What DescribeSession says that calls change, without some tensors."""
        gone = sum(self.tensors[number].size_bytes for number in without)
        return {
            "step": self.step,
            "keep_bytes": self.keep_bytes,
            "used_bytes": self.used_bytes - gone,
            "tensors": [
                (
                    number,
                    each.role,
                    each.name,
                    each.array.dtype.name,
                    each.array.shape,
                    each.copy,
                    each.size_bytes,
                    sorted(each.states),
                    each.updates,
                    each.parts if each.role == GRADIENT else [],
                )
                for number, each in sorted(self.tensors.items())
                if number not in without
            ],
        }

    # What calls do.

    def put(self, header: pb2.TensorHeader, data: bytes) -> None:
        """PutTensor succeeds."""
        dtype, shape = NUMBERS[header.dtype], tuple(header.shape)
        if header.zeros:
            array = np.zeros(shape, dtype)
        else:
            array = np.frombuffer(data, dtype).reshape(shape)
        if header.state:
            weight = self.tensors[header.tensor]
            weight.states[header.state] = array
            weight.updates = header.updates
            return
        self.spare.pop(header.tensor, None)
        empty = header.role == GRADIENT and header.zeros
        self.tensors[header.tensor] = Kept(
            header.role, array, header.compute_dtype, header.name, empty=empty
        )

    def drop(self, numbers: Iterable[int]) -> None:
        """DropTensors succeeds."""
        for number in numbers:
            self.tensors.pop(number, None)
            self.spare.pop(number, None)

    def operand(self, number: int) -> Kept | None:
        """The tensor that a job finds under a number."""
        return self.tensors.get(number) or self.spare.get(number)

    def job(
        self,
        job: job_pb2.Job,
        sent: Mapping[str, np.ndarray],
        results: Mapping[str, np.ndarray],
        applied: Iterable[job_pb2.Applied],
    ) -> None:
        """A job succeeds.

        Args:
            sent: The operands that it keeps.
            results: The results that stay.
            applied: What the receipt says of these.
        """
        told = {each.tensor: each.again for each in applied}
        expected = {}
        for name, result in results.items():
            kept = getattr(job, name).kept
            gradient = self.tensors[kept.tensor]
            elements = result.reshape(gradient.array.shape)
            again = False
            if kept.HasField("add"):
                assert kept.add.step == self.step
                again = gradient.add(kept.add.part, kept.add.parts, elements)
            else:
                gradient.next_step(keep=False)
                gradient.array, gradient.empty = elements, False
            expected[kept.tensor] = again
        assert told == expected, (told, expected)
        for name in OPERANDS:
            operand = getattr(job, name)
            if operand.HasField("keep"):
                self.spare.pop(operand.keep.tensor, None)
                self.tensors[operand.keep.tensor] = Kept(
                    ACTIVATION, sent[name], kept_at=self.step
                )
        for name in OPERANDS:
            kept = getattr(job, name).kept
            if kept.last_use:
                found = self.tensors.pop(kept.tensor, None)
                if found is not None:
                    self.spare[kept.tensor] = found

    def step_made(
        self,
        request: pb2.StepRequest,
        response: pb2.StepResponse,
        updated: Mapping[int, Kept],
    ) -> None:
        """Step succeeds.

        Args:
            updated: Weights and states, as they are now.
        """
        key = request.SerializeToString(deterministic=True)
        if request.step == self.step and self.last is not None:
            assert (key, response.again) == (self.last[0], True)
            same = pb2.StepResponse()
            same.CopyFrom(response)
            same.again = False
            # As bytes: a norm that is NaN is not equal to itself.
            assert same.SerializeToString() == self.last[1].SerializeToString()
            return
        assert request.step == response.step == self.step + 1
        assert not response.again
        self.step += 1
        self.last = (key, response)
        named = set()
        for group in request.groups:
            states = _states(group)
            for parameter in group.parameters:
                weight = self.tensors[parameter.weight]
                gradient = self.tensors[parameter.gradient]
                assert gradient.is_complete
                named.add(parameter.gradient)
                if not response.skipped and not gradient.empty:
                    now = updated[parameter.weight]
                    weight.updates += 1
                    weight.array = now.array
                    for state in states:
                        weight.states[state] = now.states[state]
        for number, each in self.tensors.items():
            if each.role == GRADIENT:
                assert each.is_complete
                each.next_step(keep=number not in named or request.keep_gradients)
        for number, each in list(self.tensors.items()):
            if each.role == ACTIVATION and each.kept_at + 1 < self.step:
                del self.tensors[number]
        self.spare.clear()

    def may_be_lost(self, job: job_pb2.Job) -> set[int]:
        """Activations that may be gone if a job fails that was accepted.

        It keeps its operands in their place, and takes their memory if it must.
        """
        shapes = {"x": (job.m, job.n), "dy": (job.m, job.k)}
        keeps = {
            getattr(job, name).keep.tensor: int(np.prod(shape))
            for name, shape in shapes.items()
            if getattr(job, name).HasField("keep")
        }
        needed = sum(keeps.values()) * NUMBERS[job.dtype].itemsize
        spare = sum(each.size_bytes for each in self.spare.values())
        if self.used_bytes + spare + needed <= self.keep_bytes:
            return set()
        return {number for number in keeps if number in self.tensors}

    # Why calls are refused. Empty: they must succeed.

    def wrong_job(self, job: job_pb2.Job) -> set[str]:
        """Reasons for which a job with a valid header may be refused."""
        wrong: set[str] = set()
        shapes = {"x": (job.m, job.n), "w": (job.n, job.k), "dy": (job.m, job.k)}
        sums = {"dw": (job.n, job.k), "db": (1, job.k)}
        if job.session.HasField("step") and job.session.step != self.step:
            wrong.add("STEP_CONFLICT")
        needed = 0
        for name, shape in shapes.items():
            operand = getattr(job, name)
            if operand.HasField("kept"):
                found = self.operand(operand.kept.tensor)
                if found is None or (
                    operand.kept.tensor not in self.tensors
                    and not operand.kept.last_use
                ):
                    wrong.add("TENSOR_UNKNOWN")
                    continue
                if operand.kept.last_use and found.role != ACTIVATION:
                    wrong.add("OPTION_INVALID")
                dtypes = {found.array.dtype, NUMBERS.get(found.copy)}
                if (
                    found.role == GRADIENT
                    or found.array.shape != shape
                    or NUMBERS[job.dtype] not in dtypes
                ):
                    wrong.add("TENSOR_MISMATCH")
            elif operand.HasField("keep"):
                number = operand.keep.tensor
                needed += int(np.prod(shape)) * NUMBERS[job.dtype].itemsize
                if number in self.tensors:
                    needed -= self.tensors[number].size_bytes
                    if self.tensors[number].role != ACTIVATION:
                        wrong.add("TENSOR_MISMATCH")
        for name in NEEDS:
            result = getattr(job, name)
            if job.HasField(name) and result.HasField("kept"):
                wrong |= self._wrong_result(result, sums[name], job.dtype)
                needed += self._early_bytes(result)
        if self.used_bytes + needed > self.keep_bytes:
            wrong.add("SESSION_FULL")
        return wrong

    def _wrong_result(
        self, result: job_pb2.Result, shape: tuple[int, ...], dtype: int
    ) -> set[str]:
        found = self.tensors.get(result.kept.tensor)
        if found is None:
            return {"TENSOR_UNKNOWN"}
        wrong = set()
        shapes = {shape, shape[1:]} if shape[0] == 1 else {shape}
        if found.role != GRADIENT or found.array.shape not in shapes:
            wrong.add("TENSOR_MISMATCH")
        if found.array.dtype != NUMBERS.get(result.dtype or dtype):
            wrong.add("TENSOR_MISMATCH")
        if result.kept.HasField("add"):
            if result.kept.add.step != self.step:
                wrong.add("STEP_CONFLICT")
            if found.parts and found.expected != result.kept.add.parts:
                wrong.add("TENSOR_MISMATCH")
        return wrong

    def _early_bytes(self, result: job_pb2.Result) -> int:
        found = self.tensors.get(result.kept.tensor)
        if found is None or not result.kept.HasField("add"):
            return 0
        part = result.kept.add.part
        waits = part > found.added and part not in found.early
        return found.array.nbytes if waits else 0

    def wrong_step(self, request: pb2.StepRequest) -> set[str]:
        """Reasons for which a step of valid optimizers may be refused."""
        key = request.SerializeToString(deterministic=True)
        if self.last is not None and request.step == self.step:
            return set() if key == self.last[0] else {"STEP_CONFLICT"}
        if request.step != self.step + 1:
            return {"STEP_CONFLICT"}
        wrong: set[str] = set()
        seen: set[int] = set()
        needed = 0
        for group in request.groups:
            for parameter in group.parameters:
                pair = (parameter.weight, parameter.gradient)
                if seen & set(pair) or pair[0] == pair[1]:
                    wrong.add("OPTION_INVALID")
                seen |= set(pair)
                weight, gradient = (self.tensors.get(number) for number in pair)
                if weight is None or gradient is None:
                    wrong.add("TENSOR_UNKNOWN")
                    continue
                if (
                    weight.role != WEIGHT
                    or weight.array.dtype.name not in {"float32", "float64"}
                    or gradient.role != GRADIENT
                    or gradient.array.shape != weight.array.shape
                    or gradient.array.dtype != weight.array.dtype
                ):
                    wrong.add("TENSOR_MISMATCH")
                elif not gradient.empty:
                    new = set(_states(group)) - set(weight.states)
                    needed += len(new) * weight.array.nbytes
        if not seen:
            wrong.add("OPTION_INVALID")
        if not all(t.is_complete for t in self.tensors.values() if t.role == GRADIENT):
            wrong.add("GRADIENT_INCOMPLETE")
        if self.used_bytes + needed > self.keep_bytes:
            wrong.add("SESSION_FULL")
        return wrong


def _states(group: pb2.ParameterGroup) -> tuple[str, ...]:
    if group.WhichOneof("optimizer") == "adam":
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if group.sgd.momentum else ()


def described(response: pb2.DescribeSessionResponse) -> dict[str, Any]:
    """A description as `SessionModel.described` has it."""
    return {
        "step": response.step,
        "keep_bytes": response.keep_bytes,
        "used_bytes": response.used_bytes,
        "tensors": [
            (
                info.header.tensor,
                info.header.role,
                info.header.name,
                NUMBERS[info.header.dtype].name,
                tuple(info.header.shape),
                info.header.compute_dtype,
                info.size_bytes,
                sorted(info.states),
                info.updates,
                list(info.parts),
            )
            for info in response.tensors
        ],
    }


def same_numbers(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays hold the same numbers, of which NaN is one."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    wide = [each.astype(np.float64) for each in (one, other)]
    return bool(np.array_equal(*wide, equal_nan=True))
