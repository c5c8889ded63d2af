"""Everything that the sessions of both clients have in common, without I/O."""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
import os
import re
import secrets
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypedDict

import numpy as np
from grpc import StatusCode

from gradwire._api.errors import (
    CallError,
    ClientStateError,
    InputError,
    SessionFullError,
    SessionLostError,
    StateNotSavedError,
    StepConflictError,
)
from gradwire._api.optimizers import SGD, Adam, AdamW, Optimizer
from gradwire._api.options import DtypeLike, parse_dtype
from gradwire._api.session_types import (
    SavedState,
    SessionInfo,
    SessionSummary,
    StepResult,
    TensorInfo,
)
from gradwire._api.types import device_of
from gradwire._arrays.operand import Operand, read
from gradwire._client.session_files import SavedTensor
from gradwire._client.step_tensors import argument_name, check_pair, check_role
from gradwire._core.kept import Keeping, Tensor, refuse_copy
from gradwire_protocol.dtypes import WIRE_DTYPES, Dtype
from gradwire_protocol.error_details import ErrorDetails
from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.job_spec import Contribution, KeptResult
from gradwire_protocol.limits import (
    MAX_NAME_LENGTH,
    MAX_STATE_NAME_LENGTH,
    SESSION_STATE,
    SESSIONS,
)
from gradwire_protocol.matrices import Matrix
from gradwire_protocol.v1 import session_service_pb2 as pb2

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_STATE_NAME = re.compile(rf"[A-Za-z0-9._-]{{1,{MAX_STATE_NAME_LENGTH}}}")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:iB|B)?", re.IGNORECASE | re.ASCII)
_MOST_BYTES = (1 << 64) - 1

SHARED_FROM_BYTES = 1 << 20
"""Size of a frozen tensor from which the server is asked whether it has it: it takes a
round trip, and a hash of the elements, 0.6 s for 1 GB."""


@dataclass(slots=True, eq=False)
class _Round:
    """A gradient's contributions between two steps, or since it was cleared."""

    next_part: int = 0
    stepped: bool = False
    """Whether a step was made since."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A context's contribution to a gradient."""

    of: _Round
    contribution: Contribution


@dataclass(frozen=True, slots=True)
class _UnsettledStep:
    """A step that was requested, and that the client has not counted."""

    request: pb2.StepRequest
    made: bool
    """Whether it was made for certain, but not saved."""


@dataclass(slots=True, eq=False)
class Context:
    """What a session's `backward` needs of a `forward`.

    Attributes:
        x: X, kept in the session.
        w: W.
    """

    x: Tensor
    w: Tensor
    lead: tuple[int, ...]
    """Leading dimensions of X, which count as rows."""
    local_x: Any = field(repr=False)
    """The caller's X, to be sent again if the session no longer has it."""
    wire_dtype: DtypeLike
    """Option of the forward job, which holds for X."""
    parts: dict[int, _Part] = field(default_factory=dict, repr=False)
    """The contributions made from this context, by number of the gradient."""
    uses_up: bool = field(default=True, repr=False)
    """Whether X was kept for this context alone, and goes with its `backward`."""

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_copy("context of a session")


class SessionOptions(TypedDict, total=False):
    """Options of `AsyncClient.session`."""

    lease_s: float | None
    label: str
    restore: str | None
    save_every: int | None
    save_as: str | None


class SessionBase:
    """The state of a session.

    Attributes:
        step_count: Steps so far, with those of a restored state.
        tensors: The named weights and gradients of a restored state, by name; of a
            name that several have, a weight, and the one with the lowest number.
    """

    def __init__(
        self,
        keep: int | str,
        *,
        lease_s: float | None = None,
        label: str = "",
        restore: str | None = None,
        save_every: int | None = None,
        save_as: str | None = None,
    ) -> None:
        self.restored = "" if restore is None else check_state(restore, "restore")
        self.save_every, self.save_as = parse_saving(save_every, save_as)
        self.tensors: dict[str, Tensor] = {}
        self.keep_bytes = parse_size(keep)
        self.lease_s = parse_lease(lease_s)
        self.label = check_name(label, "label")
        self.token = ""
        self.affinity = secrets.token_hex(8)
        """What a proxy recognizes the session's calls by. It is no secret."""
        self._id = ""
        self.server_instance = ""
        """The server process that has the session."""
        self.step_count = 0
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._rounds: dict[int, _Round] = {}
        """The contributions to each gradient since the last step."""
        self._unsettled: _UnsettledStep | None = None
        self._ended = False
        self._process = 0
        """The process that has opened the session."""

    def __repr__(self) -> str:
        state = "closed" if self._ended else "open" if self.token else "not open"
        label = f" {self.label!r}" if self.label else ""
        return f"<gradwire session{label}, {state}, {self.step_count} steps>"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_copy("session")

    def __del__(self) -> None:
        # Of a session whose arguments were invalid, not even the token was set.
        if getattr(self, "token", "") and not self._ended and not self.is_inherited:
            warnings.warn(
                f"{self!r} was dropped and not closed: use it as a context manager,"
                " or call close()",
                ResourceWarning,
                stacklevel=2,
            )

    @property
    def is_open(self) -> bool:
        """Whether the session was opened, and not closed here."""
        return bool(self.token) and not self._ended

    @property
    def is_inherited(self) -> bool:
        """Whether another process has opened the session, and this is its fork."""
        return bool(self.token) and self._process != os.getpid()

    def require_new(self) -> None:
        """Check that the session has not been opened.

        Raises:
            ClientStateError: It has.
        """
        if self.token:
            state = "closed" if self._ended else "open already"
            raise ClientStateError(f"this session is {state}: create another one")

    def opened(self, answer: pb2.OpenSessionResponse) -> None:
        """Use the server's answer to OpenSession."""
        self._process = os.getpid()
        self.token = answer.session
        self._id = answer.id
        self.server_instance = answer.server_instance
        self.lease_s = answer.lease_seconds
        self.step_count = answer.step

    def ended(self) -> None:
        """Note that the session is being closed."""
        self._ended = True

    def open_request(self) -> pb2.OpenSessionRequest:
        """Return the request that opens the session, to be repeated as it is."""
        features = [SESSIONS]
        if self.restored or self.save_as:
            features.append(SESSION_STATE)
        return pb2.OpenSessionRequest(
            label=self.label,
            lease_seconds=self.lease_s,
            keep_bytes=self.keep_bytes,
            required_features=features,
            restore=self.restored,
            save_every_steps=self.save_every,
            save_name=self.save_as,
            idempotency_key=_new_key(),
        )

    def take_tensors(self, info: SessionInfo) -> None:
        """Take over the tensors that the session was opened with."""
        numbers = [each.number for each in info.tensors]
        self._numbers = itertools.count(max(numbers, default=0) + 1)
        weights_first = sorted(info.tensors, key=lambda each: each.role != "weight")
        for each in weights_first:
            if each.name:
                handle = Tensor(
                    self,
                    each.number,
                    each.shape,
                    Dtype.named(each.dtype),
                    each.role,
                    name=each.name,
                    compute=Dtype.named(each.compute_dtype)
                    if each.compute_dtype
                    else None,
                )
                self.tensors.setdefault(each.name, handle)

    def require_open(self) -> None:
        """Check that the session is open, in this process.

        Raises:
            ClientStateError: It is not.
        """
        if self._ended:
            raise ClientStateError("this session is closed: open another one")
        if not self.token:
            raise ClientStateError(
                "this session is not open: use it as a context manager, or call open()"
            )
        # Two processes would give the same numbers to different tensors.
        if self.is_inherited:
            raise ClientStateError(
                "this session belongs to the process that has opened it, of which this"
                " one is a fork: open a session of its own here"
            )

    def new_number(self) -> int:
        """Return a number for a new tensor."""
        return next(self._numbers)

    def new_tensor(
        self,
        shape: tuple[int, ...],
        dtype: Dtype,
        role: int,
        *,
        name: str = "",
        compute_dtype: DtypeLike = None,
        zeros: bool = False,
        number: int | None = None,
        keep_states: bool = False,
        frozen: bool = False,
    ) -> tuple[Tensor, pb2.TensorHeader]:
        """Return a handle and the header of a tensor to put.

        Args:
            shape: Its shape.
            dtype: Its dtype.
            role: A `TensorRole`.
            name: Its name.
            compute_dtype: Dtype of its copy for jobs.
            zeros: Whether all elements are 0.
            number: Its number, of a tensor to replace; None: a new one.
            keep_states: Whether it takes over the optimizer states of that one.
            frozen: Whether it never changes.
        """
        compute = None
        if compute_dtype is not None:
            compute = parse_dtype(compute_dtype, "compute_dtype", WIRE_DTYPES)
            if dtype is not Dtype.FLOAT32:
                raise InputError(
                    f"compute_dtype is {compute.label}, but the tensor is"
                    f" {dtype.label}: expected a float32 tensor"
                )
        tensor = Tensor(
            self,
            self.new_number() if number is None else number,
            shape,
            dtype,
            _role_name(role),
            name=check_name(name, "name"),
            compute=compute,
        )
        header = pb2.TensorHeader(
            session=self.token,
            tensor=tensor.number,
            name=tensor.name,
            shape=shape,
            dtype=dtype.proto_name,
            role=role,  # type: ignore[arg-type]
            compute_dtype=compute.proto_name if compute else None,
            zeros=zeros,
            keep_states=keep_states,
            frozen=frozen,
            idempotency_key=_new_key(),
        )
        return tensor, header

    def state_header(
        self, weight: Tensor, state: str, shape: tuple[int, ...], updates: int
    ) -> pb2.TensorHeader:
        """Return the header of an optimizer state to put.

        Args:
            weight: Its weight.
            state: Its name.
            shape: Its shape, that of the weight.
            updates: The weight's updates so far.
        """
        return pb2.TensorHeader(
            session=self.token,
            tensor=weight.number,
            name=weight.name,
            shape=shape,
            dtype=Dtype.named(weight.dtype).proto_name,
            role=pb2.TENSOR_ROLE_WEIGHT,
            state=state,
            updates=updates,
            idempotency_key=_new_key(),
        )

    def own(self, value: object, name: str) -> Tensor:
        """Check that a value is a tensor of this session.

        Raises:
            InputError: It is not.
        """
        if not isinstance(value, Tensor):
            raise InputError(
                f"{name} is a {type(value).__qualname__}: expected a tensor of this"
                " session, as returned by put or zeros_like"
            )
        if value.session is not self:
            raise InputError(f"{name} is a tensor of another session")
        return value

    def keeping(
        self,
        given: Mapping[Matrix, Any],
        *,
        keep: Mapping[Matrix, int] | None = None,
        into: Mapping[Matrix, KeptResult] | None = None,
        last_use: Matrix | None = None,
        leads: Mapping[Matrix, tuple[int, ...]] | None = None,
    ) -> Keeping:
        """Return the kept part of a job.

        Args:
            given: Its operands, of which some are tensors.
            keep: Operands to keep, and the numbers of the tensors.
            into: Results that stay in gradients.
            last_use: The operand that is used up.
            leads: Leading dimensions of kept operands that are kept with fewer.

        Raises:
            InputError: A tensor is not of this session, or is transposed.
        """
        for matrix, value in given.items():
            if isinstance(value, Tensor) and value.transposed:
                raise InputError(
                    f"{matrix.label} is {value!r}: only a kept W can be transposed"
                )
        return Keeping(
            session=self.token,
            affinity=self.affinity,
            tensors={
                matrix: self.own(value, matrix.label)
                for matrix, value in given.items()
                if isinstance(value, Tensor)
            },
            leads=leads or {},
            last_use=last_use,
            keep=keep or {},
            into=into or {},
        )

    def gradients_of(
        self, into: object, bias_into: object, *, transposed: bool
    ) -> dict[Matrix, Tensor]:
        """Return the gradients to which a job adds its results, by result.

        Args:
            into: The gradient of W, or None.
            bias_into: The gradient of a bias, or None.
            transposed: Whether W is.

        Raises:
            InputError: One is no gradient of this session, or is transposed and W is
                not.
        """
        gradients = {}
        for name, gradient, matrix in (
            ("into", into, Matrix.DW),
            ("bias_into", bias_into, Matrix.DB),
        ):
            if gradient is not None:
                own = gradients[matrix] = self.own(gradient, name)
                check_role(own, name, "gradient")
                if own.transposed and not transposed:
                    raise InputError(
                        f"{name} is {own!r}, but W is not transposed: pass {name}.T"
                    )
        return gradients

    def contribution(self, gradient: Tensor, parts: dict[int, _Part]) -> Contribution:
        """Return the next part of a gradient; the same one for the same context.

        After a step it is the part of the step before, which the server refuses:
        nobody knows whether it was counted. Once the gradient was cleared, it is a new
        one.

        Args:
            gradient: The gradient.
            parts: The parts that the context has made, to which this one is added.
        """
        number = gradient.number
        with self._lock:
            current = self._rounds.setdefault(number, _Round())
            made = parts.get(number)
            if made is not None and (made.of is current or made.of.stepped):
                return made.contribution
            contribution = Contribution(self.step_count, current.next_part)
            current.next_part += 1
            parts[number] = _Part(current, contribution)
            return contribution

    def forget_parts(self, number: int) -> None:
        """Begin again with a gradient's parts, because it was put anew."""
        with self._lock:
            self._rounds.pop(number, None)

    def step_request(
        self,
        groups: Sequence[tuple[Optimizer, Mapping[Tensor, Tensor]]],
        **options: Any,
    ) -> pb2.StepRequest:
        """Return the request of the next step.

        Raises:
            InputError: An argument is invalid.
        """
        request = pb2.StepRequest(
            session=self.token, step=self.step_count + 1, **_step_options(options)
        )
        seen: set[int] = set()
        for index, group in enumerate(groups):
            try:
                optimizer, gradients = group
            except (TypeError, ValueError):
                raise InputError(
                    f"a further group is {group!r}: expected a pair (optimizer,"
                    " {w: g})"
                ) from None
            if not isinstance(optimizer, SGD | Adam | AdamW):
                raise InputError(
                    f"optimizer is {optimizer!r}: expected a gradwire.SGD, Adam or"
                    " AdamW"
                )
            if not isinstance(gradients, Mapping):
                raise InputError(
                    f"gradients is a {type(gradients).__qualname__}: expected a"
                    " mapping of weights to gradients, {w: g}"
                )
            message = request.groups.add()
            spec = optimizer.spec()
            getattr(message, spec.kind).CopyFrom(spec.to_message())
            for weight, gradient in gradients.items():
                own = self.own(weight, argument_name("weight", index))
                its = self.own(gradient, argument_name("gradient", index))
                check_pair(own, its, index, seen)
                message.parameters.add(weight=own.number, gradient=its.number)
        if not seen:
            raise InputError("gradients is empty: expected at least one weight")
        return request

    def step_made(self, response: pb2.StepResponse) -> StepResult:
        """Count a step."""
        self._count_step(response.step)
        return StepResult(response.step, response.total_norm, response.skipped)

    def step_failed(self, request: pb2.StepRequest, error: BaseException) -> None:
        """Remember a step that may have been made, and forget one that was not."""
        refused = isinstance(error, CallError) and is_refusal(error)
        unsettled = _UnsettledStep(request, isinstance(error, StateNotSavedError))
        with self._lock:
            if request.step > self.step_count:
                self._unsettled = None if refused else unsettled

    def repeats_unsettled(self, request: pb2.StepRequest) -> bool:
        """Return whether a request is that of the step whose outcome is not known."""
        unsettled = self._unsettled
        return unsettled is not None and unsettled.request == request

    def unsettled_step(self) -> pb2.StepRequest | None:
        """Return the request of a step whose outcome is not known, or None.

        A step that was made and not saved counts from now on: its caller was told, and
        goes on without repeating it.
        """
        unsettled = self._unsettled
        if unsettled is not None and unsettled.made:
            self._count_step(unsettled.request.step)
            return None
        return None if unsettled is None else unsettled.request

    def _count_step(self, step: int) -> None:
        with self._lock:
            if step <= self.step_count:
                return  # another thread has completed it
            self.step_count = step
            self._unsettled = None
            # The parts of all gradients begin anew.
            for past in self._rounds.values():
                past.stepped = True
            self._rounds.clear()


def is_refusal(error: CallError) -> bool:
    """Whether a server has not made a step, neither now nor at an earlier attempt.

    It answers a step that was made before it checks anything else.
    """
    refusals = (StatusCode.INVALID_ARGUMENT, StatusCode.FAILED_PRECONDITION)
    return error.reason is not None and error.status in refusals


def _new_key() -> bytes:
    """Return what identifies a request when it is repeated."""
    return secrets.token_bytes(16)


def is_lost(error: CallError, tensor: Tensor) -> bool:
    """Whether a job failed because the session no longer has a tensor."""
    return error.reason is Reason.TENSOR_UNKNOWN and error.metadata.get(
        "tensor"
    ) == str(tensor.number)


_STEP_NUMBERS = ("max_norm", "local_sum_of_squares", "inverse_scale")


def _step_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a step.

    Raises:
        InputError: A number is not finite or less than 0, or a switch is no bool.
    """
    options = {}
    for name, value in given.items():
        if name in _STEP_NUMBERS:
            number = to_float(value)
            # In the contract, a factor of 0 is one that is not set.
            if not 0 <= number < math.inf or (name == "inverse_scale" and not number):
                least = "more than 0" if name == "inverse_scale" else "at least 0"
                raise InputError(
                    f"{name} is {value!r}: expected a finite number, {least}"
                )
            options[name] = number
        elif value in (True, False):
            options[name] = bool(value)
        else:
            raise InputError(f"{name} is {value!r}: expected True or False")
    return options


_SWAPPED = {"x": "dy", "dy": "x", "y": "dx", "dx": "y"}
_LABEL = re.compile(r"\b(dx|dy|x|y)\b")


@contextlib.contextmanager
def callers_names(*, swapped: bool) -> Iterator[None]:
    """Give errors the caller's names of matrices.

    Args:
        swapped: Whether X and dY, and Y and dX, change places: the job of a transposed
            W has the caller's X as its dY.
    """
    try:
        yield
    except InputError as error:
        if not swapped:
            raise
        text = _LABEL.sub(lambda match: _SWAPPED[str(match[0])], str(error))
        raise InputError(text) from None


def swapped_names(given: Any) -> Any:
    """Return a mapping by the names of results, with those of a transposed W's job."""
    return {_SWAPPED.get(name, name): value for name, value in given.items()}


def result_dtypes(
    given: Any, gradients: Iterable[tuple[Matrix, Tensor]], *, swapped: bool
) -> Any:
    """Return the option `result_dtype` of a job.

    Args:
        given: The caller's.
        gradients: Gradients for results. Those that the caller does not name have the
            gradient's dtype, since they are not sent.
        swapped: As for `callers_names`.
    """
    if given is not None and not isinstance(given, Mapping):
        return given
    dtypes: dict[Any, Any] = {
        result.label: gradient.dtype for result, gradient in gradients
    }
    dtypes |= swapped_names(given or {}) if swapped else given or {}
    return dtypes or None


def check_columns(
    given: Any, name: str, w_shape: tuple[int, ...], columns: int
) -> None:
    """Check the columns of a row operand beside a transposed W.

    Raises:
        InputError: It has others.
    """
    shape = tuple(np.shape(given) if not hasattr(given, "shape") else given.shape)
    if shape and shape[-1] != columns:
        rows = "rows" if name == "x" else "columns"
        raise InputError(
            f"{name} has shape {shape} and w {w_shape}: {name}'s columns"
            f" ({shape[-1]}) must equal w's {rows} ({columns})"
        )


def put_operand(value: Any, name: str) -> tuple[Operand, tuple[int, ...]]:
    """Return the elements of an array to put, and its shape.

    Raises:
        InputError: The value is not an array.
    """
    source = read(value, name)
    array = source.array
    # Operands have at least two dimensions.
    rows = array if array.ndim >= 2 else array.reshape(1, -1)
    return source.part(rows), array.shape


def elements_bytes(tensor: Tensor | TensorInfo) -> int:
    """Return the bytes of a tensor's elements, or of one of its optimizer states."""
    return math.prod(tensor.shape) * Dtype.named(tensor.dtype).itemsize


def check_to_save(tensor: TensorInfo, saved: Mapping[str, object]) -> None:
    """Check that a weight can be saved beside others.

    Raises:
        InputError: It has no name, or the name of another one.
    """
    if not tensor.name or tensor.name in saved:
        taken = "another weight has it too" if tensor.name else "it is empty"
        raise InputError(
            f"the weight with number {tensor.number} and shape {tensor.shape} has the"
            f" name {tensor.name!r}: {taken}; put it with a name of its own to save it"
        )


def check_same_step(before: SessionInfo, after: SessionInfo) -> None:
    """Check that no step was made while a session was saved.

    Raises:
        StepConflictError: One was made.
    """
    if before.step != after.step:
        raise StepConflictError(
            f"step {after.step} was made while the session was saved: save it between"
            " steps",
            status=Reason.STEP_CONFLICT.status,
            attached=ErrorDetails(Reason.STEP_CONFLICT),
        )


def plan_restore(
    info: SessionInfo, saved: Mapping[str, SavedTensor]
) -> dict[str, tuple[SavedTensor, TensorInfo | None]]:
    """Return the weights to restore by name, and those that they replace.

    The new ones are first: as long as only they are put, they can be dropped again.

    Raises:
        SessionFullError: The session has no memory for all of them.
    """
    weights = {each.name: each for each in info.tensors if each.role == "weight"}
    names = sorted(saved, key=lambda name: name in weights)
    plan = {name: (saved[name], weights.get(name)) for name in names}
    used = most = info.used_bytes
    for tensor, earlier in plan.values():
        used += tensor.size_bytes
        most = max(most, used)  # the earlier one goes when the new one is there
        used += tensor.states_bytes - (earlier.size_bytes if earlier else 0)
        most = max(most, used)
    if most > info.keep_bytes:
        raise SessionFullError(
            f"the file needs {most} bytes in a session with keep_bytes of"
            f" {info.keep_bytes}, of which {info.used_bytes} are used: nothing was"
            " restored",
            status=Reason.SESSION_FULL.status,
            attached=ErrorDetails(Reason.SESSION_FULL),
        )
    return plan


def half_restored(error: Exception) -> SessionLostError:
    """Return the error of a session that was closed when it was half restored."""
    return SessionLostError(
        f"restoring failed when some weights were replaced, and the session was"
        f" closed: {error}",
        status=Reason.SESSION_EXPIRED.status,
        attached=ErrorDetails(Reason.SESSION_EXPIRED),
    )


def session_info_of(message: pb2.DescribeSessionResponse) -> SessionInfo:
    """Convert the contract's description of a session."""
    return SessionInfo(
        label=message.label,
        server_instance=message.server_instance,
        device=device_of(message.device),
        lease_s=message.lease_seconds,
        step=message.step,
        keep_bytes=message.keep_bytes,
        used_bytes=message.used_bytes,
        tensors=tuple(_tensor_info(info) for info in message.tensors),
    )


def summary_of(message: pb2.SessionSummary) -> SessionSummary:
    """Convert the contract's summary of a session."""
    return SessionSummary(
        id=message.id,
        label=message.label,
        device=message.device,
        step=message.step,
        tensors=message.tensors,
        keep_bytes=message.keep_bytes,
        used_bytes=message.used_bytes,
        lease_s=message.lease_seconds,
        idle_s=message.idle_seconds,
        age_s=message.age_seconds,
    )


def saved_state_of(message: pb2.SavedState) -> SavedState:
    """Convert the contract's description of a saved state."""
    return SavedState(
        name=message.name,
        step=message.step if message.HasField("step") else None,
        size_bytes=message.size_bytes,
        age_s=message.age_seconds,
    )


def _role_name(role: int) -> str:
    """Return the name of a `TensorRole`: "weight", "gradient" or "activation"."""
    name = pb2.TensorRole.Name(role)
    return name.removeprefix("TENSOR_ROLE_").lower()


def _tensor_info(info: pb2.TensorInfo) -> TensorInfo:
    header = info.header
    compute = Dtype(header.compute_dtype).label if header.compute_dtype else None
    return TensorInfo(
        number=header.tensor,
        name=header.name,
        role=_role_name(header.role),
        shape=tuple(header.shape),
        dtype=Dtype(header.dtype).label,
        compute_dtype=compute,
        size_bytes=info.size_bytes,
        states=tuple(info.states),
        updates=info.updates,
        parts=tuple(info.parts),
        frozen=header.frozen,
        sharers=info.sharers,
    )


def parse_size(value: int | str) -> int:
    """Return a number of bytes: an integer, or a text such as "2GiB".

    Raises:
        InputError: The value is no size.
    """
    size = 0
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip())
        if match is not None and len(match[1]) <= _MOST_DIGITS:
            size = int(float(match[1]) * _UNITS[match[2].upper()])
    elif not isinstance(value, bool):
        with contextlib.suppress(TypeError):
            size = operator.index(value)
    if 0 < size <= _MOST_BYTES:
        return size
    raise InputError(
        f'keep is {value!r}: expected a number of bytes, or a text such as "2GiB"'
    )


_MOST_DIGITS = 32


def to_float(value: Any) -> float:
    """Return a number; NaN if the value is none."""
    if isinstance(value, bool | str | bytes):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    except (TypeError, ValueError):
        return math.nan


def check_id(id: str) -> str:  # noqa: A002 - as clients call it
    """Check the id of a session, as an operator gives it.

    Raises:
        InputError: It is none.
    """
    if not isinstance(id, str) or not id:
        raise InputError(f"id is {id!r}: expected that of a session, as listed")
    return id


def check_state(name: str, what: str) -> str:
    """Check the name of a saved state.

    Raises:
        InputError: It is not valid.
    """
    if not isinstance(name, str) or not _STATE_NAME.fullmatch(name):
        raise InputError(
            f"{what} is {str(name)[:80]!r}: expected 1 to {MAX_STATE_NAME_LENGTH}"
            " letters, digits, '.', '_' or '-'"
        )
    return name


def parse_saving(every: int | None, name: str | None) -> tuple[int, str]:
    """Return after how many steps a session is saved, and as what; (0, ""): never.

    Raises:
        InputError: They are invalid, or one is missing.
    """
    if (every is None) != (name is None):
        given, missing = ("save_every", "save_as")
        if every is None:
            given, missing = missing, given
        raise InputError(f"{given} is given without {missing}: they go together")
    if every is None or name is None:
        return 0, ""
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise InputError(f"save_every is {every!r}: expected a number of steps")
    return every, check_state(name, "save_as")


def gradient_name(name: str, weight: str) -> str:
    """Return the name of a weight's gradient.

    It has one unless told, so that it is found again in a restored session.
    """
    made = f"{weight}.grad" if weight else ""
    return name or (made if len(made) <= MAX_NAME_LENGTH else "")


def parse_lease(value: float | None) -> float:
    """Return a lease in seconds; 0: the server's default.

    Raises:
        InputError: The value is no time.
    """
    if value is None:
        return 0.0
    seconds = to_float(value)
    if seconds > 0:
        return seconds
    raise InputError(f"lease_s is {value!r}: expected a number of seconds, more than 0")


def check_updates(updates: int) -> None:
    """Check the number of updates of a weight whose state is put.

    Raises:
        InputError: It is no number, or 0: a momentum buffer would be begun anew.
    """
    if isinstance(updates, bool) or not isinstance(updates, int) or updates < 1:
        raise InputError(f"updates is {updates!r}: expected a number of at least 1")


def check_name(name: str, what: str) -> str:
    """Check a label or a tensor's name.

    Raises:
        InputError: It is not short and printable.
    """
    if not isinstance(name, str) or len(name) > MAX_NAME_LENGTH:
        raise InputError(
            f"{what} is {str(name)[:32]!r}...: expected at most {MAX_NAME_LENGTH}"
            " characters"
        )
    if name and not (name.isascii() and name.isprintable()):
        raise InputError(f"{what} is {name!r}: expected printable ASCII characters")
    return name
