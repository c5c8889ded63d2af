"""Steps: updates of a session's weights from their gradients."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.optimizers import (
    CLIP_EPSILON,
    OPTIMIZERS,
    Optimizer,
    OptimizerError,
    Sgd,
    check_optimizer,
)
from gradwire_protocol.v1 import session_service_pb2 as pb2
from gradwire_server.backends.base import (
    DeviceLostError,
)
from gradwire_server.backends.kept_memory import KeptArray
from gradwire_server.errors import JobError
from gradwire_server.scheduling.device_worker import TenantHandle
from gradwire_server.sessions.digest import digest
from gradwire_server.sessions.registry import Sessions
from gradwire_server.sessions.saved_states import SavedStates
from gradwire_server.sessions.session import LastStep, Session
from gradwire_server.sessions.tensors import Gradient, KeptTensor

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Parameter:
    """A weight to update."""

    weight: KeptTensor
    gradient: Gradient
    total: KeptArray
    """The sum of the gradient's contributions."""
    optimizer: Optimizer


async def make_step(
    sessions: Sessions,
    session: Session,
    request: pb2.StepRequest,
    worker: TenantHandle,
    states: SavedStates | None = None,
) -> pb2.StepResponse:
    """Make a step, or return the response of the same step.

    Once weights change, the step goes on to its end even if its call is cancelled.

    Args:
        sessions: The server's sessions.
        session: The session, in use by the caller.
        request: The step.
        worker: The worker of the session's device.
        states: Where the session's state is saved, if it is.

    Raises:
        JobError: The request is invalid, or in conflict with the session's steps; or
            the step was made, but the state that was due was not saved: an equal
            request saves it again.
        MemoryError: The device has no memory for the step. Nothing has changed.
        DeviceLostError: The device is no longer usable.
    """
    made_of = digest(request)
    await session.turns.take_alone()
    handed_over = False
    try:
        session.require_open()
        made = session.last_step
        if made is not None and request.step == session.step:
            if made.request != made_of:
                raise _conflict(session, request, "and made it with another request")
            if states is not None:
                await states.save_if_due(session, worker)
            again = pb2.StepResponse()
            again.CopyFrom(made.response)
            again.again = True
            return again
        if request.step != session.step + 1:
            raise _conflict(session, request, f"so the next is {session.step + 1}")
        step = _Step(session, request, worker)
        step.allocate_states()
        task = asyncio.create_task(_run_to_end(sessions, session, step, worker, states))
        handed_over = True
    finally:
        if not handed_over:
            session.turns.release_alone()
    use = sessions.used(session.token, session.tenant)
    use.__enter__()

    def ended(task: asyncio.Task[pb2.StepResponse]) -> None:
        session.turns.release_alone()
        use.__exit__(None, None, None)
        if not task.cancelled():
            task.exception()  # nobody awaits it if the call was cancelled

    task.add_done_callback(ended)
    sessions.step_begun(task)
    return await asyncio.shield(task)


async def _run_to_end(
    sessions: Sessions,
    session: Session,
    step: _Step,
    worker: TenantHandle,
    states: SavedStates | None,
) -> pb2.StepResponse:
    try:
        response = await step.run()
    except _HalfMadeError as error:
        lost = JobError(
            Reason.SESSION_EXPIRED,
            f"step {session.step + 1} failed when weights had changed, and the session "
            f"was closed: {error}",
        )
        sessions.fail(session, lost)
        if isinstance(error.__cause__, DeviceLostError):
            raise error.__cause__ from None
        raise lost from error
    if states is not None:
        await states.save_if_due(session, worker)
    return response


class _HalfMadeError(Exception):
    """A step failed when some weights had changed."""


class _Step:
    """One step, in the pieces that a device worker runs."""

    def __init__(
        self, session: Session, request: pb2.StepRequest, worker: TenantHandle
    ) -> None:
        self._session = session
        self._memory = session.memory
        self._on_device = session.memory.on_device
        self._request = request
        self._worker = worker
        self._parameters = _parse(session, request)
        self._others = _others(session, self._parameters)
        """Gradients that the step does not name: they keep their contributions."""
        self._filled = [each for each in self._parameters if not each.gradient.empty]
        """Parameters that are updated."""
        self._new_states: dict[int, dict[str, KeptArray]] = {}
        """States that weights have from this step on, if it is not skipped."""
        self._inverse_scale = request.inverse_scale or 1.0
        for name in ("max_norm", "local_sum_of_squares"):
            _check_finite(name, getattr(request, name), least=0.0)
        _check_finite("inverse_scale", self._inverse_scale, least=0.0)
        self._digest = digest(request)

    def allocate_states(self) -> None:
        """Allocate the optimizers' states of weights that have none yet.

        Raises:
            JobError: The session has no memory for them. Nothing has changed.
        """
        needed = [
            (each.weight, name)
            for each in self._filled
            for name in each.optimizer.states
            if name not in each.weight.states
        ]
        # All together, so that the error says how much the session has to keep.
        self._memory.require(sum(weight.array.nbytes for weight, _ in needed))
        try:
            for weight, name in needed:
                state = self._memory.allocate(weight.array.shape, weight.array.dtype)
                self._new_states.setdefault(weight.number, {})[name] = state
        except BaseException:
            self._return_states()
            raise

    async def run(self) -> pb2.StepResponse:
        """Make the step."""
        request = self._request
        try:
            norm = await self._norm()
            skipped = request.skip_nonfinite and not math.isfinite(norm)
            if not skipped:
                scale = self._inverse_scale * _clip(request.max_norm, norm)
                await self._update_all(scale)
        finally:
            self._return_states()
        for each in self._parameters:
            each.gradient.next_step(keep=request.keep_gradients)
        for gradient in self._others:
            gradient.next_step(keep=True)
        response = pb2.StepResponse(step=request.step, total_norm=norm, skipped=skipped)
        self._session.step_made(LastStep(self._digest, response))
        return response

    def _return_states(self) -> None:
        """Return the memory of states that no weight has got."""
        for states in self._new_states.values():
            self._memory.release(*states.values())
        self._new_states.clear()

    async def _norm(self) -> float:
        """Return the norm N."""
        squares = 0.0
        for each in self._filled:
            for part in each.weight.pieces(self._on_device.piece_elements):
                squares += await self._do(
                    partial(self._on_device.sum_of_squares, each.total, part)
                )
        if squares:  # a factor that is infinite when squared times 0 is no number
            squares *= self._inverse_scale * self._inverse_scale
        squares += self._request.local_sum_of_squares
        return math.sqrt(squares) if squares >= 0 else squares

    async def _update_all(self, scale: float) -> None:
        for each in self._filled:
            new = self._new_states.get(each.weight.number, {})
            for part in each.weight.pieces(self._on_device.piece_elements):
                try:
                    await self._do(partial(self._update, each, new, part, scale))
                except Exception as error:
                    raise _HalfMadeError(str(error) or type(error).__name__) from error
        for each in self._filled:
            each.weight.states |= self._new_states.pop(each.weight.number, {})
            each.weight.updates += 1

    def _update(
        self,
        parameter: _Parameter,
        new: dict[str, KeptArray],
        part: slice,
        scale: float,
    ) -> None:
        """Update elements of a weight and its copy; runs in the worker thread."""
        weight, optimizer = parameter.weight, parameter.optimizer
        for state in new.values():
            self._on_device.clear(state, part)
        # A momentum buffer is the gradient at first, also if the weight was updated
        # without momentum before.
        made = 0 if new and isinstance(optimizer, Sgd) else weight.updates
        self._on_device.update(
            optimizer,
            weight.array,
            parameter.total,
            weight.states | new,
            part,
            made=made,
            scale=scale,
        )
        if weight.copy is not None:
            self._on_device.round(weight.array, weight.copy, part)

    async def _do(self, run: Callable[[], T]) -> T:
        return await self._worker.submit(self, run)


def _clip(max_norm: float, norm: float) -> float:
    if not max_norm:
        return 1.0
    coefficient = max_norm / (norm + CLIP_EPSILON)
    return coefficient if coefficient < 1.0 or math.isnan(coefficient) else 1.0


def _parse(session: Session, request: pb2.StepRequest) -> list[_Parameter]:
    parameters: list[_Parameter] = []
    seen: set[int] = set()
    for index, group in enumerate(request.groups):
        optimizer = _optimizer(group, f"groups[{index}]")
        for position, given in enumerate(group.parameters):
            path = f"groups[{index}].parameters[{position}]"
            for name, number in (
                ("weight", given.weight),
                ("gradient", given.gradient),
            ):
                if number in seen:
                    raise JobError(
                        Reason.OPTION_INVALID,
                        f"{path}.{name} is {number}, which the step names twice",
                        field=f"{path}.{name}",
                    )
                seen.add(number)
            weight = session.tensor(given.weight, f"{path}.weight")
            gradient = session.tensor(given.gradient, f"{path}.gradient")
            parameters.append(_checked(weight, gradient, optimizer, path))
    if not parameters:
        raise JobError(
            Reason.OPTION_INVALID,
            "groups has no parameters: expected at least one",
            field="groups",
        )
    return parameters


def _others(session: Session, parameters: list[_Parameter]) -> list[Gradient]:
    """Return the session's other gradients, whose parts count anew from this step on.

    Raises:
        JobError: One of them lacks a contribution, which could not come later.
    """
    named = {id(each.gradient) for each in parameters}
    others = []
    for tensor in session.tensors.values():
        gradient = tensor.gradient
        if gradient is not None and id(gradient) not in named:
            gradient.check_complete(f"tensor {tensor.number}")
            others.append(gradient)
    return others


def _checked(
    weight: KeptTensor, gradient: KeptTensor, optimizer: Optimizer, path: str
) -> _Parameter:
    if weight.role != pb2.TENSOR_ROLE_WEIGHT or weight.dtype not in _UPDATED:
        raise JobError(
            Reason.TENSOR_MISMATCH,
            f"{path}.weight is {weight.number}, a {weight.dtype.label} tensor: "
            f"expected a weight of {' or '.join(each.label for each in _UPDATED)}",
            field=f"{path}.weight",
        )
    if weight.frozen:
        raise JobError(
            Reason.TENSOR_MISMATCH,
            f"{path}.weight is {weight.number}, which is frozen: put it again without "
            f"header.frozen",
            field=f"{path}.weight",
        )
    expected = (weight.array.shape, weight.array.dtype)
    if (
        gradient.gradient is None
        or (gradient.array.shape, gradient.array.dtype) != expected
    ):
        raise JobError(
            Reason.TENSOR_MISMATCH,
            f"{path}.gradient is {gradient.number}, of shape {gradient.array.shape} "
            f"and {gradient.dtype.label}: expected a gradient of shape "
            f"{weight.array.shape} and {weight.dtype.label}",
            field=f"{path}.gradient",
        )
    gradient.gradient.check_complete(f"{path}.gradient")
    return _Parameter(weight, gradient.gradient, gradient.array, optimizer)


_UPDATED = (Dtype.FLOAT32, Dtype.FLOAT64)


def _optimizer(group: pb2.ParameterGroup, path: str) -> Optimizer:
    kind = group.WhichOneof("optimizer")
    if kind is None:
        raise JobError(
            Reason.OPTION_UNKNOWN,
            f"{path}.optimizer is not set, or is of a kind that this server does not "
            f"know: expected {' or '.join(OPTIMIZERS)}",
            field=f"{path}.optimizer",
        )
    optimizer = OPTIMIZERS[kind].from_message(getattr(group, kind))
    try:
        check_optimizer(optimizer, f"{path}.{kind}")
    except OptimizerError as error:
        raise JobError(Reason.OPTION_INVALID, str(error), field=error.field) from None
    return optimizer


def _check_finite(name: str, value: float, *, least: float) -> None:
    if not math.isfinite(value) or value < least:
        raise JobError(
            Reason.OPTION_INVALID,
            f"{name} is {value:g}: expected a number of at least {least:g}",
            field=name,
        )


def _conflict(session: Session, request: pb2.StepRequest, what: str) -> JobError:
    return JobError(
        Reason.STEP_CONFLICT,
        f"step is {request.step}, but the session has made {session.step} steps, "
        f"{what}",
        field="step",
        metadata={"step": str(session.step)},
    )
