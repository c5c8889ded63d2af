"""A lane: one device, the one thread that talks to it, and fair turns.

The unit of scheduling is a row block, not a job: a lane takes one piece of
work from each job that has some, in turn, so that a small job never waits
for a large one to end. It never waits for bytes or for a reader: only work
whose operands are complete is handed to it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

_log = logging.getLogger("gradwire_server")


@dataclass(slots=True)
class _Work:
    run: Callable[[], Any]
    done: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop


def _nothing() -> None:
    pass


class Lane:
    """A thread that does the work of many jobs, one piece of each in turn.

    Args:
        device: Number of the device of its backend.
        enter: What its thread does first.
    """

    def __init__(self, device: int, enter: Callable[[], None] = _nothing) -> None:
        self.device = device
        self._enter = enter
        self._queues: OrderedDict[Hashable, deque[_Work]] = OrderedDict()
        self._busy_with: Hashable | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(
            target=self._serve, name=f"gradwire-lane-{device}", daemon=True
        )
        self._thread.start()

    def submit(self, job: Hashable, run: Callable[[], T]) -> asyncio.Future[T]:
        """Does `run` when it is the job's turn, after the job's earlier work.

        Returns:
            A future of the calling event loop with what `run` returns or
            raises.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()
        with self._changed:
            if self._closed:
                raise RuntimeError("the lane is closed")
            self._queues.setdefault(job, deque()).append(_Work(run, done, loop))
            self._changed.notify_all()
        return done

    async def discard(self, job: Hashable) -> None:
        """Drops the job's waiting work and waits for what is being done.

        When this returns, the lane touches nothing of the job any more. It
        takes at most as long as one piece of work, and finishes even if the
        caller is cancelled meanwhile.
        """
        with self._changed:
            for work in self._queues.pop(job, ()):
                work.done.cancel()
            if self._busy_with != job:
                return
        idle = asyncio.get_running_loop().run_in_executor(None, self._wait_idle, job)
        cancelled: asyncio.CancelledError | None = None
        while not idle.done():
            try:
                await asyncio.shield(idle)
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled

    def close(self) -> None:
        """Ends the thread after the piece of work that it is doing."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _wait_idle(self, job: Hashable) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._busy_with != job)

    def _serve(self) -> None:
        self._enter()
        while (taken := self._next()) is not None:
            result, error = None, None
            try:
                result = taken.run()
            except Exception as raised:  # noqa: BLE001 - the job handles it
                error = raised
            finally:
                self._finished()
            self._hand_over(taken, result, error)
            del taken, result, error  # they would hold a job's memory until the next

    def _next(self) -> _Work | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._queues)
            if self._closed:
                return None
            job, queue = next(iter(self._queues.items()))
            work = queue.popleft()
            if queue:
                self._queues.move_to_end(job)
            else:
                del self._queues[job]
            self._busy_with = job
            return work

    def _finished(self) -> None:
        with self._changed:
            self._busy_with = None
            self._changed.notify_all()

    @staticmethod
    def _hand_over(work: _Work, result: object, error: Exception | None) -> None:
        def settle() -> None:
            if work.done.done():
                return
            if error is not None:
                work.done.set_exception(error)
                # A job that an earlier piece has ended does not ask any more,
                # and asyncio would log that nobody did.
                work.done.exception()
            else:
                work.done.set_result(result)

        try:
            work.loop.call_soon_threadsafe(settle)
        except RuntimeError:
            _log.debug("a result came after its event loop was closed")
