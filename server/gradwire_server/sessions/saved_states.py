"""States of sessions that outlast the server: saved and restored beside the event loop.

When a state is saved by itself: within the step, after the last update and before the
response. Later, an answered step could be lost, and its client would believe in it.
Earlier, there is nothing to save. A step that was saved and not answered is no loss
either: its client learns the restored step from OpenSessionResponse and goes on behind
it.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.v1 import session_service_pb2 as pb2
from gradwire_server.backends.kept_memory import KeptArray, KeptMemory
from gradwire_server.errors import JobError
from gradwire_server.scheduling.device_worker import TenantHandle
from gradwire_server.sessions.session import Session
from gradwire_server.sessions.state_contents import (
    SavedState,
    SavedTensor,
    snapshot,
)
from gradwire_server.sessions.state_files import StateFiles, check_name
from gradwire_server.sessions.tensors import Gradient, KeptTensor
from gradwire_server.sessions.windows import ReadWindow, Work, WriteWindow

T = TypeVar("T")

_THREADS = 4
"""Files that are written or read at once: disks are slow, and some wait for each
other."""


class SavedStates:
    """The saved states of a server's sessions.

    Args:
        directory: Where they are.

    Raises:
        StateDirectoryError: It cannot be used.
    """

    def __init__(self, directory: Path) -> None:
        self._files = StateFiles(directory)
        self._threads = ThreadPoolExecutor(_THREADS, "gradwire-states")

    async def save(
        self, session: Session, name: str, worker: TenantHandle
    ) -> pb2.SaveSessionResponse:
        """Save a session's state.

        The caller holds the session's turn alone, so that nothing changes meanwhile.

        Args:
            session: The session.
            name: Name of the state.
            worker: The worker of the session's device.

        Raises:
            JobError: It cannot be saved; an earlier state of that name is unchanged.
        """
        check_name(name, "name")
        state = snapshot(session.step, session.tensors.values())
        reach = _Reach(session.memory.on_device, worker)
        size = await self._beside(
            lambda check: self._files.save(
                session.tenant, name, state, reach.access(check)
            )
        )
        session.newest_saved = session.step
        if name == session.save_name:
            session.saved_step = session.step
        return pb2.SaveSessionResponse(step=state.step, size_bytes=size)

    async def save_if_due(self, session: Session, worker: TenantHandle) -> None:
        """Save a session's state if its last step calls for it, and it is not saved.

        The caller holds the session's turn alone.

        Raises:
            JobError: It cannot be saved.
        """
        every = session.save_every
        if every and not session.step % every and session.saved_step != session.step:
            await self.save(session, session.save_name, worker)

    async def open(self, tenant: str, name: str, keep_bytes: int) -> SavedState:
        """Open a state to restore it into a session of `keep_bytes`.

        Raises:
            JobError: There is no such state of the tenant, it is damaged, or it is too
                large for the session.
        """
        check_name(name, "restore")
        state = await self._beside(lambda _: self._files.open(tenant, name))
        if state.size_bytes > keep_bytes:
            state.close()
            raise JobError(
                Reason.SESSION_FULL,
                f"keep_bytes is {keep_bytes}, and the tensors of the saved state "
                f"{name!r} use {state.size_bytes}: open the session with more",
                field="keep_bytes",
            )
        return state

    async def list(self, tenant: str) -> list[pb2.SavedState]:
        """Return a tenant's states, in the order of their names."""
        return await self._beside(lambda _: self._files.list(tenant))

    async def delete(self, tenant: str, name: str, sessions: Iterable[Session]) -> None:
        """Delete a state of a tenant.

        Args:
            tenant: The tenant.
            name: The state's name.
            sessions: The tenant's sessions: those that save under the name save anew.

        Raises:
            JobError: There is none of that name, or it cannot be deleted.
        """
        check_name(name, "name")
        await self._beside(lambda _: self._files.delete(tenant, name))
        for session in sessions:
            if session.save_name == name:
                session.saved_step = None

    async def restore(
        self, session: Session, state: SavedState, worker: TenantHandle
    ) -> None:
        """Give a new session, in use by the caller, a state's tensors and its step.

        Args:
            session: The session.
            state: The state.
            worker: The worker of the session's device.

        Raises:
            JobError: The state is damaged, or the session has no memory for it. The
                session is then of no use.
        """
        arrays: dict[str, KeptArray] = {}
        tensors = [_allocated(session, each, arrays) for each in state.tensors]
        memory = session.memory.on_device
        reach = _Reach(memory, worker)

        def read(check: Callable[[], None]) -> None:
            access = reach.access(check)
            state.read(arrays, access)
            for tensor in tensors:
                if tensor.copy is None:
                    continue
                for part in tensor.pieces(memory.piece_elements):
                    access.do(partial(memory.round, tensor.array, tensor.copy, part))

        await self._beside(read)
        session.require_open()
        session.step = state.step
        for tensor in tensors:
            tensor.kept_at = state.step
            session.keep(tensor)

    def close(self) -> None:
        """End the threads. What they do is done to its end."""
        self._threads.shutdown(wait=False)

    async def _beside(self, do: Callable[[Callable[[], None]], T]) -> T:
        """Do something in a thread, and do not return before it has ended.

        Its memory belongs to a session. If the caller is cancelled, it is stopped, by
        the function that it gets and calls now and then.
        """
        stopped = threading.Event()

        def check() -> None:
            if stopped.is_set():
                raise _StoppedError

        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._threads, do, check)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            stopped.set()
            while not future.done():
                # Another cancellation changes nothing.
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([future])
            if not future.cancelled():
                made = future.exception() or future.result()
                if isinstance(made, SavedState):
                    made.close()
            raise


class _StoppedError(Exception):
    """The caller no longer waits."""


class _Reach:
    """The way from other threads to a session's memory.

    Args:
        memory: The memory.
        worker: The worker of its device.
    """

    def __init__(self, memory: KeptMemory, worker: TenantHandle) -> None:
        self._memory = memory
        self._worker = worker
        self._loop = asyncio.get_running_loop()

    def access(self, check: Callable[[], None]) -> _Access:
        """Return access for one thread; `check` may raise an exception to stop."""
        return _Access(self._memory, self._do, check)

    def _do(self, work: Work) -> None:
        if self._memory.in_host_memory:
            work()
        else:
            doing = self._do_in_worker(work)
            asyncio.run_coroutine_threadsafe(doing, self._loop).result()

    async def _do_in_worker(self, work: Work) -> None:
        await self._worker.submit(self, work)


class _Access:
    """Access to the bytes of a session's arrays from another thread."""

    def __init__(
        self,
        memory: KeptMemory,
        do: Callable[[Work], None],
        check: Callable[[], None],
    ) -> None:
        self._read = ReadWindow(memory)
        self._write = WriteWindow(memory)
        self._do = do
        self._check = check

    def bytes_of(self, array: KeptArray, begin: int, end: int) -> memoryview:
        self.do(self._read.load(array, begin, end))
        return self._read.seen(array, begin, end)

    def room_for(self, array: KeptArray, begin: int, end: int) -> memoryview:
        self.do(self._write.make_room(array, begin, end))
        return self._write.room(array, begin, end)

    def end(self) -> None:
        self.do(self._write.rest())

    def do(self, work: Work | None) -> None:
        """Do work on the session's device, if there is any, unless stopped."""
        self._check()
        if work is not None:
            self._do(work)


def _allocated(
    session: Session, saved: SavedTensor, arrays: dict[str, KeptArray]
) -> KeptTensor:
    """Return a tensor without elements; add what is to be read to `arrays`."""

    def allocate(dtype: Dtype) -> KeptArray:
        return session.memory.allocate(saved.shape, dtype)

    array = allocate(saved.dtype)
    if saved.elements is not None:
        arrays[saved.elements] = array
    states = {}
    for state, name in saved.states.items():
        states[state] = arrays[name] = allocate(saved.dtype)
    gradient = None
    if saved.role == pb2.TENSOR_ROLE_GRADIENT:
        gradient = Gradient(array, session.memory)
        gradient.empty = saved.elements is None
        gradient.carried = not gradient.empty
    return KeptTensor(
        number=saved.number,
        name=saved.name,
        role=saved.role,
        array=array,
        copy=None if saved.compute is None else allocate(saved.compute),
        gradient=gradient,
        states=states,
        updates=saved.updates,
        frozen=saved.frozen,
    )
