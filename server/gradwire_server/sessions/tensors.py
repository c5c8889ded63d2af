"""The tensors of a session."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.job_spec import Contribution
from gradwire_protocol.v1 import session_service_pb2 as pb2
from gradwire_server.backends.kept_memory import KeptArray
from gradwire_server.errors import JobError
from gradwire_server.sessions.session_memory import SessionMemory


class Gradient:
    """The contributions to a gradient since the last step.

    Contributions are added in the order of their numbers. An early one is held until
    the ones before it have come. `replace` and `add` are called in the thread of the
    device worker and need the lock, so that all sums of a job are added, or none. Other
    methods may be called in any thread.

    Args:
        total: Memory for the sum.
        memory: The session's memory, for early contributions.
    """

    def __init__(self, total: KeptArray, memory: SessionMemory[Any]) -> None:
        self._total = total
        self._memory = memory
        self.lock = threading.Lock()
        self._early: dict[int, KeptArray] = {}
        self._added = 0
        self._parts = 0
        self._dropped = False
        self.empty = True
        """Whether nothing has been added or put since the last step."""
        self.carried = False
        """Whether the sum begins with that of an earlier step, which kept it."""

    @property
    def parts(self) -> list[int]:
        """The numbers of the contributions that have come."""
        return [*range(self._added), *sorted(self._early)]

    def check_parts(self, contribution: Contribution, path: str) -> None:
        """Check that a contribution counts the parts as the earlier ones did.

        Raises:
            JobError: It does not.
        """
        has_parts = self._added or self._early
        if has_parts and contribution.parts != self._parts:
            raise JobError(
                Reason.TENSOR_MISMATCH,
                f"{path}.add.parts is {contribution.parts}, but the gradient already "
                f"has parts of {self._parts}",
                field=f"{path}.add.parts",
            )

    def is_early(self, contribution: Contribution | None, path: str) -> bool:
        """Check a contribution, or a sum that replaces this one (None).

        Returns:
            Whether it has to wait for others, in memory of its own.

        Raises:
            JobError: The gradient was dropped or has got other parts meanwhile.
        """
        if self._dropped:
            raise JobError(
                Reason.TENSOR_UNKNOWN,
                f"{path}.tensor was dropped or replaced while the job ran",
                field=f"{path}.tensor",
            )
        if contribution is None:
            return False
        self.check_parts(contribution, path)
        part = contribution.part
        return part > self._added and part not in self._early

    def replace(self, elements: KeptArray) -> None:
        """Replace the sum."""
        self._forget()
        self._memory.on_device.copy(elements, self._total)
        self.empty = False
        self.carried = False

    def add(self, contribution: Contribution, elements: KeptArray) -> bool:
        """Add a contribution, unless it was added before.

        Args:
            contribution: Its number.
            elements: As many as the sum has, of its dtype; if it is early, in memory of
                the session's that is the gradient's from now on.

        Returns:
            Whether it had been added before.
        """
        part = contribution.part
        if part < self._added or part in self._early:
            return True
        if part > self._added:
            self._early[part] = elements
        else:
            self._add(elements)
        self._parts = contribution.parts
        while (following := self._early.pop(self._added, None)) is not None:
            self._add(following)
            self._memory.release(following)
        return False

    def check_complete(self, path: str) -> None:
        """Check that no contribution is missing.

        Raises:
            JobError: One is.
        """
        expected = self._parts or self._added + len(self._early)
        if self._early or (self._added and self._added != expected):
            raise JobError(
                Reason.GRADIENT_INCOMPLETE,
                f"{path} has no part {self._added} yet, of {expected}",
                field=path,
            )

    def next_step(self, *, keep: bool) -> None:
        """Begin with the parts of the next step.

        Args:
            keep: Whether they are added to the sum of the parts before.
        """
        with self.lock:
            empty = self.empty
            self._forget()
            self.empty = empty or not keep
            self.carried = not self.empty

    def drop(self) -> None:
        """Forget all contributions, and refuse more."""
        with self.lock:
            self._dropped = True
            self._forget()

    def _add(self, elements: KeptArray) -> None:
        if self.empty:
            self._memory.on_device.copy(elements, self._total)
        else:
            self._memory.on_device.add(elements, self._total)
        self.empty = False
        self._added += 1

    def _forget(self) -> None:
        self._memory.release(*self._early.values())
        self._early.clear()
        self._added = self._parts = 0
        self.empty = True


class Contents(NamedTuple):
    """What tensors that share memory have in common."""

    tenant: str
    device: int
    """Position of the device."""
    sha256: bytes
    """SHA-256 of the elements, little-endian."""
    shape: tuple[int, ...]
    dtype: Dtype
    compute: int
    """Dtype of the copy for jobs, or 0."""


@dataclass(eq=False, slots=True)
class KeptTensor:
    """A tensor of a session."""

    number: int
    name: str
    role: int
    """A `TensorRole`."""
    array: KeptArray
    """Its elements."""
    copy: KeptArray | None = None
    """The elements rounded to the compute dtype, for jobs."""
    gradient: Gradient | None = None
    """The contributions, if it is a gradient."""
    states: dict[str, KeptArray] = field(default_factory=dict)
    """Optimizer states, by name."""
    updates: int = 0
    """Updates by steps that were not skipped."""
    kept_at: int = 0
    """Steps of the session when it was kept."""
    users: int = 0
    """Calls that use it: it keeps its memory for them, also when it was dropped."""
    dropped: bool = False
    """Whether it is no longer one of the session's tensors."""
    frozen: bool = False
    """Whether its elements never change."""
    contents: Contents | None = None
    """What equal tensors have in common, to share memory with them; None: it does not
    share."""

    @property
    def dtype(self) -> Dtype:
        """Element type."""
        return self.array.dtype

    @property
    def arrays(self) -> list[KeptArray]:
        """The tensor, its copy and its states."""
        copies = [] if self.copy is None else [self.copy]
        return [self.array, *copies, *self.states.values()]

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor, its copy and its states."""
        return sum(array.nbytes for array in self.arrays)

    def in_dtype(self, dtype: Dtype) -> KeptArray | None:
        """Return the elements in a dtype: the tensor or its copy; None: neither."""
        for array in (self.array, self.copy):
            if array is not None and array.dtype is dtype:
                return array
        return None

    def pieces(self, piece_elements: int) -> Iterator[slice]:
        """Yield parts of the elements, for pieces of a device worker's work.

        A tensor may be so large that other jobs would wait too long for it.
        """
        for first in range(0, self.array.size, piece_elements):
            yield slice(first, min(first + piece_elements, self.array.size))

    def header(self, state: str = "") -> pb2.TensorHeader:
        """Return the tensor's header, or that of one of its states."""
        array = self.states[state] if state else self.array
        compute = None
        if self.copy is not None and not state:
            compute = self.copy.dtype.proto_name
        return pb2.TensorHeader(
            tensor=self.number,
            name=self.name,
            shape=array.shape,
            dtype=array.dtype.proto_name,
            role=self.role,  # type: ignore[arg-type] # an int, checked before
            compute_dtype=compute,
            state=state,
            updates=self.updates if state else 0,
            frozen=self.frozen,
        )

    def info(self, sharers: int) -> pb2.TensorInfo:
        """Return the tensor's description.

        Args:
            sharers: Number of tensors with this one's memory, if it may be shared.
        """
        return pb2.TensorInfo(
            header=self.header(),
            size_bytes=self.size_bytes,
            states=list(self.states),
            updates=self.updates,
            parts=self.gradient.parts if self.gradient else [],
            sharers=sharers,
        )
