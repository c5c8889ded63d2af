"""One session: its tensors, its memory, its steps and its lease."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.v1 import session_service_pb2 as pb2
from gradwire_server.backends.kept_memory import KeptMemory
from gradwire_server.errors import JobError
from gradwire_server.sessions.puts import Puts
from gradwire_server.sessions.session_memory import SessionMemory
from gradwire_server.sessions.sharing import SharedTensors
from gradwire_server.sessions.tensors import KeptTensor
from gradwire_server.sessions.turns import Turns

MAX_TENSORS = 8192
"""Most tensors of a session: their descriptions are sent in one message."""


@dataclass(frozen=True, slots=True)
class LastStep:
    """A step that was made, to answer the same request again."""

    request: bytes
    """A digest: requests may be large."""
    response: pb2.StepResponse


class Session:
    """A session of one tenant on one device.

    Everything except `memory` is used in the event loop's thread alone.

    Args:
        tenant: The owner.
        label: A name for people.
        keep_bytes: Bytes for its tensors.
        lease_s: Seconds without a call after which it expires.
        device: Position of its device.
        memory: Its memory there.
        shared: The frozen tensors of all sessions.
        on_free: Called once the session is over and no call uses it.

    Attributes:
        token: Its name in calls, a secret.
        id: Its name for people.
        memory: The memory of its tensors.
        turns: The order of its jobs and steps.
        step: Steps so far.
        tensors: Its tensors, by number.
        puts: The calls that put them.
        shared: The frozen tensors of all sessions.
        last_step: The last step of this server; None before the first.
        save_every: Save its state after every so many steps; 0: never.
        save_name: Name of that state.
        saved_step: Step of the state that is saved under `save_name`.
        newest_saved: Step of the last state that was saved, under any name.
        request: A digest of the request that has opened it, if that can be repeated.
        ended: Why calls are refused; None while it is open.
        expiry: The next look at its lease.
    """

    def __init__(
        self,
        tenant: str,
        label: str,
        keep_bytes: int,
        lease_s: float,
        *,
        device: int,
        memory: KeptMemory,
        shared: SharedTensors,
        on_free: Callable[[], None],
    ) -> None:
        self.token = secrets.token_urlsafe(32)
        self.id = f"session-{secrets.token_hex(4)}"
        self.tenant = tenant
        self.label = label
        self.keep_bytes = keep_bytes
        self.lease_s = lease_s
        self.device = device
        self.memory: SessionMemory[KeptTensor] = SessionMemory(keep_bytes, memory)
        self.turns = Turns()
        self.step = 0
        self.tensors: dict[int, KeptTensor] = {}
        self.puts = Puts()
        self.last_step: LastStep | None = None
        self.save_every = 0
        self.save_name = ""
        self.saved_step: int | None = None
        self.newest_saved: int | None = None
        self.request = b""
        self.ended: JobError | None = None
        self.expiry: asyncio.TimerHandle | None = None
        self.freed = asyncio.Event()
        self.shared = shared
        self._on_free = on_free
        self._users = 0
        self.renewed_at = self.opened_at = asyncio.get_running_loop().time()

    def summary(self) -> pb2.SessionSummary:
        """Return the session's description for people."""
        now = asyncio.get_running_loop().time()
        return pb2.SessionSummary(
            id=self.id,
            label=self.label,
            device=self.device,
            step=self.step,
            tensors=len(self.tensors),
            keep_bytes=self.keep_bytes,
            used_bytes=self.used_bytes,
            lease_seconds=self.lease_s,
            idle_seconds=0.0 if self.in_use else now - self.renewed_at,
            age_seconds=now - self.opened_at,
        )

    @property
    def used_bytes(self) -> int:
        """Bytes used by tensors."""
        return self.memory.used_bytes

    @property
    def log(self) -> dict[str, object]:
        """What log lines name the session by: nothing of it is secret."""
        tenant = {"tenant": self.tenant} if self.tenant else {}
        return {"session": self.id, "label": self.label, **tenant}

    @property
    def is_unsaved(self) -> bool:
        """Whether a step was made here that the state of `save_name` has not.

        Before its first step, a client can put the tensors again, and an earlier state
        of the name may be of more use than they.
        """
        return self.last_step is not None and self.saved_step != self.step

    @property
    def in_use(self) -> bool:
        """Whether a call uses the session."""
        return self._users > 0

    @contextmanager
    def using(self, tensor: KeptTensor) -> Iterator[None]:
        """Use a tensor's memory within this context, also if it is dropped."""
        tensor.users += 1
        try:
            yield
        finally:
            tensor.users -= 1
            if tensor.dropped and not tensor.users:
                self.memory.release(*tensor.arrays)

    @contextmanager
    def lending(self, tensor: KeptTensor) -> Iterator[None]:
        """Keep a tensor's memory for another session's put within this context.

        The lease is not renewed: the client of this session may be gone.
        """
        self._users += 1
        try:
            with self.using(tensor):
                yield
        finally:
            self._users -= 1
            if self.ended is not None:
                self._free_if_unused()

    @contextmanager
    def used(self) -> Iterator[None]:
        """Use the session within this context, and renew its lease at both ends."""
        self.require_open()
        self._users += 1
        self._renew()
        try:
            yield
        finally:
            self._users -= 1
            self._renew()
            if self.ended is not None:
                self._free_if_unused()

    def require_open(self) -> None:
        """Check that the session is open.

        Raises:
            JobError: It is over.
        """
        if self.ended is not None:
            raise self.ended.bare()

    def end(self, cause: JobError) -> None:
        """Refuse further calls, and free the memory once no call uses it."""
        if self.ended is None:
            self.ended = cause
            self.shared.end(self)
        if self.expiry is not None:
            self.expiry.cancel()
        self._free_if_unused()

    def keep(self, tensor: KeptTensor) -> None:
        """Make a tensor, of the session's memory, one of the session's."""
        self.drop(tensor.number)
        self.tensors[tensor.number] = tensor
        self.shared.add(self, tensor)

    def drop(self, number: int) -> None:
        """Drop a tensor, if there is one of that number."""
        self.memory.give_up(number)
        self.puts.forget(number)
        tensor = self.tensors.pop(number, None)
        if tensor is not None:
            tensor.dropped = True
            self.shared.remove(tensor)
            if tensor.gradient is not None:
                tensor.gradient.drop()
            if not tensor.users:
                self.memory.release(*tensor.arrays)

    def use_up(self, number: int) -> None:
        """Drop an activation, and keep it for a repeated job as long as possible."""
        tensor = self.tensors.get(number)
        if tensor is None or tensor.users:
            self.drop(number)
            return
        del self.tensors[number]
        self.memory.set_aside(number, tensor)

    def restore(self, number: int) -> bool:
        """Take back an activation that was used up; return whether it was there."""
        if number in self.tensors:
            return False
        tensor = self.memory.take_back(number)
        if tensor is None:
            return False
        self.tensors[number] = tensor
        return True

    def tensor(self, number: int, path: str) -> KeptTensor:
        """Return a tensor.

        Raises:
            JobError: The session has no tensor of that number.
        """
        tensor = self.tensors.get(number)
        if tensor is None:
            raise JobError(
                Reason.TENSOR_UNKNOWN,
                f"{path} is {number}: the session has no tensor of this number",
                field=path,
                metadata={"tensor": str(number)},
            )
        return tensor

    def check_count(self, number: int, path: str) -> None:
        """Check that the session can have a tensor of this number.

        Raises:
            JobError: The number is 0, or the session has `MAX_TENSORS`.
        """
        if not number:
            raise JobError(
                Reason.OPTION_INVALID, f"{path} is 0: expected at least 1", field=path
            )
        if number not in self.tensors and len(self.tensors) >= MAX_TENSORS:
            raise JobError(
                Reason.SESSION_FULL,
                f"the session has {MAX_TENSORS} tensors, the most that it can have",
                field=path,
            )

    def check_step(self, step: int, path: str) -> None:
        """Check that a call was made for the current step.

        Raises:
            JobError: It was made for another one.
        """
        if step != self.step:
            raise JobError(
                Reason.STEP_CONFLICT,
                f"{path} is {step}, but the session has made {self.step} steps",
                field=path,
                metadata={"step": str(self.step)},
            )

    def step_made(self, made: LastStep) -> None:
        """Count a step, and drop activations that were kept before the step before."""
        self.step = made.response.step
        self.last_step = made
        self.memory.give_up_all()
        for tensor in list(self.tensors.values()):
            old = tensor.role == pb2.TENSOR_ROLE_ACTIVATION
            if old and tensor.kept_at + 1 < self.step:
                self.drop(tensor.number)

    def _renew(self) -> None:
        self.renewed_at = asyncio.get_running_loop().time()

    def _free_if_unused(self) -> None:
        if not self._users and not self.freed.is_set():
            self.freed.set()
            self.tensors.clear()
            self.memory.close()
            self._on_free()
