"""The kept tensors of one job."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial

import numpy as np

from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.header_checks import path_of
from gradwire_protocol.job_spec import JobSpec
from gradwire_protocol.limits import MIB
from gradwire_protocol.matrices import Matrix
from gradwire_protocol.v1 import job_pb2
from gradwire_protocol.v1 import session_service_pb2 as pb2
from gradwire_server.backends.base import (
    Array,
)
from gradwire_server.backends.kept_memory import KeptArray
from gradwire_server.errors import JobError
from gradwire_server.sessions.session import Session
from gradwire_server.sessions.tensors import Gradient, KeptTensor

_PIECE_BYTES = 16 * MIB
"""Bytes to copy at a time in the device worker's thread."""


class JobTensors:
    """The operands that a job takes from its session, and the results left there.

    Args:
        spec: The job.
        session: Its session; None: the job has no kept tensors.

    Raises:
        JobError: A tensor is unknown, or does not fit the job.

    Attributes:
        in_host_memory: Whole kept operands in host memory; sent ones that are kept are
            to be written there.
        on_device: The other kept operands, which the backend's job reads and writes.
        applied: The contributions made.
        session_id: The session's name for people; empty: the job has no session.
    """

    def __init__(self, spec: JobSpec, session: Session | None) -> None:
        self.in_host_memory: dict[Matrix, Array] = {}
        self.on_device: dict[Matrix, KeptArray] = {}
        self.applied: list[job_pb2.Applied] = []
        self.session_id = "" if session is None else session.id
        self._spec = spec
        self._session = session
        self._kept: list[KeptTensor] = []
        self._in_use = ExitStack()
        self._used_up: list[int] = []
        self._restored: list[int] = []
        self._replaced: list[int] = []
        self._gradients: dict[Matrix, Gradient] = {}
        self._committed = False
        if session is None:
            return
        try:
            self._take_tensors(session)
        except BaseException:
            self.close()
            raise

    @property
    def device(self) -> int | None:
        """Position of the session's device; None: any."""
        return None if self._session is None else self._session.device

    def take(self, sums: Mapping[Matrix, KeptArray]) -> None:
        """Take the sums that stay in the session, all or none.

        It runs in the worker thread.

        Raises:
            JobError: The session has no memory to hold early contributions, or a
                gradient was dropped or has got other parts meanwhile.
        """
        into = self._spec.into
        with ExitStack() as locks:
            for result in sorted(self._gradients, key=lambda each: into[each].tensor):
                locks.enter_context(self._gradients[result].lock)
            taken = self._with_memory(sums)
            for result, gradient in self._gradients.items():
                add, again = into[result].add, False
                if add is None:
                    gradient.replace(taken[result])
                else:
                    again = gradient.add(add, taken[result])
                self.applied.append(
                    job_pb2.Applied(tensor=into[result].tensor, again=again)
                )

    def _with_memory(
        self, sums: Mapping[Matrix, KeptArray]
    ) -> Mapping[Matrix, KeptArray]:
        """Return the sums, those that are early in memory of the session's."""
        early = [
            result
            for result, gradient in self._gradients.items()
            if gradient.is_early(self._spec.into[result].add, path_of(result))
        ]
        if self._session is None or not early:
            return sums
        memory, copies = self._session.memory, dict[Matrix, KeptArray]()
        memory.require(sum(sums[result].nbytes for result in early))
        try:
            for result in early:
                given = sums[result]
                copies[result] = memory.allocate(given.shape, given.dtype)
                memory.on_device.copy(given, copies[result])
        except BaseException:
            memory.release(*copies.values())
            raise
        return {**sums, **copies}

    def copies(self, sent: Mapping[Matrix, Array]) -> Iterator[Callable[[], None]]:
        """Yield the work of copying the sent operands that are kept.

        Args:
            sent: The operands in shared memory, whole.
        """
        for operand in self._spec.keep:
            if operand in self.on_device:  # the job writes them there
                continue
            kept, given = self.in_host_memory[operand], sent[operand]
            rows = max(1, _PIECE_BYTES // max(1, kept[:1].nbytes))
            for first in range(0, len(kept), rows):
                part = slice(first, first + rows)
                yield partial(np.copyto, kept[part], given[part])

    def commit(self) -> None:
        """Make the kept operands tensors of the session: they are complete.

        Raises:
            JobError: A tensor was put under the number of one of them meanwhile.
        """
        if self._session is None or self._committed:
            return
        for operand, number in self._spec.keep.items():  # a put may have come first
            self._check_place(self._session, operand, number)
        self._committed = True
        while self._kept:
            self._session.keep(self._kept.pop())

    def close(self) -> None:
        """Return what the job did not complete, and drop what it has used up."""
        session = self._session
        if session is None:
            return
        while self._kept:
            session.memory.release(*self._kept.pop().arrays)
        self._in_use.close()
        if self._committed:
            for number in self._used_up:
                session.use_up(number)
        else:
            for number in self._restored:
                session.use_up(number)
            for number in self._replaced:
                session.restore(number)
        self._used_up.clear()
        self._restored.clear()
        self._replaced.clear()
        self.in_host_memory.clear()
        self.on_device.clear()
        self._gradients.clear()

    def _take_tensors(self, session: Session) -> None:
        spec = self._spec
        if spec.session_step is not None:
            session.check_step(spec.session_step, "job.session.step")
        for operand, kept in spec.kept.items():
            path = f"{path_of(operand)}.tensor"
            if kept.last_use:  # the job may be a repetition of the one that used it up
                if session.restore(kept.tensor):
                    self._restored.append(kept.tensor)
                self._used_up.append(kept.tensor)
            tensor = session.tensor(kept.tensor, path)
            self._use(operand, self._operand(operand, tensor))
            self._in_use.enter_context(session.using(tensor))
            if kept.last_use:
                self._check_last_use(operand, tensor)
        for result, into in spec.into.items():
            path = path_of(result)
            tensor = session.tensor(into.tensor, f"{path}.tensor")
            self._gradients[result] = self._gradient(result, tensor)
            self._in_use.enter_context(session.using(tensor))
            if into.add is not None:
                session.check_step(into.add.step, f"{path}.add.step")
                self._gradients[result].check_parts(into.add, path)
        self._require_room(session)
        for operand, number in spec.keep.items():
            self._kept.append(self._new(session, operand, number))
            self._use(operand, self._kept[-1].array)

    def _use(self, operand: Matrix, array: KeptArray) -> None:
        if array.host is None:
            self.on_device[operand] = array
        else:
            self.in_host_memory[operand] = array.host

    def _operand(self, operand: Matrix, tensor: KeptTensor) -> KeptArray:
        spec, path = self._spec, path_of(operand)
        self._check_shape(operand, tensor)
        if tensor.gradient is not None:
            raise JobError(
                Reason.TENSOR_MISMATCH,
                f"{path}.tensor is {tensor.number}, which is a gradient: other jobs "
                f"may change it meanwhile",
                field=f"{path}.tensor",
            )
        array = tensor.in_dtype(spec.dtype)
        if array is None:
            copy = ""
            if tensor.copy is not None:
                copy = f" with a copy in {tensor.copy.dtype.label}"
            raise JobError(
                Reason.TENSOR_MISMATCH,
                f"{path}.tensor is {tensor.number}, which is {tensor.dtype.label}"
                f"{copy}: the job's dtype is {spec.dtype.label}",
                field=f"{path}.tensor",
            )
        return array

    def _gradient(self, result: Matrix, tensor: KeptTensor) -> Gradient:
        path = path_of(result)
        self._check_shape(result, tensor)
        dtype = self._spec.results[result]
        if tensor.gradient is None or tensor.dtype is not dtype:
            kind = "gradient" if tensor.gradient else "no gradient"
            raise JobError(
                Reason.TENSOR_MISMATCH,
                f"{path}.tensor is {tensor.number}, a {tensor.dtype.label} tensor and "
                f"{kind}: expected a gradient of {dtype.label}",
                field=f"{path}.tensor",
            )
        return tensor.gradient

    def _check_shape(self, matrix: Matrix, tensor: KeptTensor) -> None:
        spec = self._spec
        shape = matrix.shape(spec.m or 0, spec.n, spec.k)
        allowed = {shape, shape[1:]} if matrix.is_vector else {shape}
        if tensor.array.shape not in allowed:
            path = path_of(matrix)
            raise JobError(
                Reason.TENSOR_MISMATCH,
                f"{path}.tensor is {tensor.number}, which has shape "
                f"{tensor.array.shape}: {matrix.label} has {shape}",
                field=f"{path}.tensor",
            )

    def _check_last_use(self, operand: Matrix, tensor: KeptTensor) -> None:
        if tensor.role != pb2.TENSOR_ROLE_ACTIVATION:
            path = f"{path_of(operand)}.last_use"
            raise JobError(
                Reason.OPTION_INVALID,
                f"{path} is true, but tensor {tensor.number} was put, not kept by a "
                f"job: use DropTensors",
                field=path,
            )

    def _require_room(self, session: Session) -> None:
        """Check that the operands to keep fit, before earlier ones make room for them.

        Raises:
            JobError: They do not, or a number is not free for one.
        """
        size_bytes = 0
        for operand, number in self._spec.keep.items():
            self._check_place(session, operand, number)
            size_bytes += self._spec.size_bytes(operand)
            earlier = session.tensors.get(number)
            if earlier is not None and not earlier.users:
                size_bytes -= earlier.size_bytes
        session.memory.require(size_bytes)

    def _new(self, session: Session, operand: Matrix, number: int) -> KeptTensor:
        spec = self._spec
        self._check_place(session, operand, number)
        shape = operand.shape(spec.m or 0, spec.n, spec.k)
        if number in session.tensors:
            # Its memory is given up if this one needs it: a repeated job replaces
            # what its first attempt has kept.
            session.use_up(number)
            self._replaced.append(number)
        return KeptTensor(
            number=number,
            name="",
            role=pb2.TENSOR_ROLE_ACTIVATION,
            array=session.memory.allocate(shape, spec.dtype),
            kept_at=session.step,
        )

    def _check_place(self, session: Session, operand: Matrix, number: int) -> None:
        path = f"job.{operand.label}.keep.tensor"
        session.check_count(number, path)
        existing = session.tensors.get(number)
        if existing is not None and existing.role != pb2.TENSOR_ROLE_ACTIVATION:
            raise JobError(
                Reason.TENSOR_MISMATCH,
                f"{path} is {number}, which is a tensor that was put: expected a new "
                f"number",
                field=path,
            )
