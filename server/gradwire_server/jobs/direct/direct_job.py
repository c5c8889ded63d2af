"""A job whose elements come and leave on direct connections.

Each socket has a thread. A row block goes from the thread that receives it to the
device worker, and from there to the thread that sends its results, without the event
loop: at a few milliseconds a block, a turn of the loop in between would cost as much as
the transfer.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeAlias

from gradwire_protocol.checksum import crc32c
from gradwire_protocol.data_plane.frames import (
    HEADER_BYTES,
    FrameHeader,
    Kind,
)
from gradwire_protocol.data_plane.sockets import DirectSocket
from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.matrices import ROW_RESULTS
from gradwire_server.admission.quota import busy
from gradwire_server.backends.base import RowBlock, Sums
from gradwire_server.errors import (
    JobError,
    client_did_not_read,
    client_sent_nothing,
    malformed,
)
from gradwire_server.jobs.direct.share_validator import ShareValidator
from gradwire_server.jobs.direct.thread_slots import ThreadSlots
from gradwire_server.jobs.stream.checkpoints import Checkpoints, DrainPoint
from gradwire_server.jobs.stream.pipeline import RowBlockPipeline
from gradwire_server.jobs.stream.request_validator import matrices_before_rows
from gradwire_server.observability.timeline import Stage
from gradwire_server.transports.data_plane import Connection
from gradwire_server.transports.data_plane.thread_side import (
    Stopped,
    ThreadSide,
    check_crc32c,
    ended_threads,
    failure_of,
    is_broken,
    looks,
)


class DirectJob:
    """Moves an admitted job's elements on direct connections.

    Args:
        pipeline: The job, opened.
        connections: Its connections, in order of their numbers.
    """

    def __init__(
        self,
        pipeline: RowBlockPipeline,
        connections: Sequence[Connection],
    ) -> None:
        spec, plan = pipeline.spec, pipeline.plan
        self._pipeline, self._spec, self._plan = pipeline, spec, plan
        self._progress = pipeline.progress
        self._count = len(connections)
        before_rows = matrices_before_rows(spec)
        self._lock = threading.Lock()
        first = spec.first_row // plan.block_rows
        self._slots = ThreadSlots(plan.slots, first, self._lock)
        self._complete: dict[int, int] = {}
        """Rows of the complete row blocks that were not submitted yet, by number."""
        self._submitted = self._computed = first
        self._shares_open = self._count
        """Connections whose share of the operands is not complete."""
        self._m = spec.m
        self._checkpoints = Checkpoints(spec, plan.segment_rows)
        self._sums_open = False
        """Whether the memory for partial sums holds those that are being sent."""
        self._segment_end = 0
        """The row after the last segment whose sums are or were to be sent."""
        self._segment_due: int | None = None
        """The row after a segment whose sums wait for that memory."""
        self._handed_over = False
        self._last_sums_begun = False
        self._stopped = False
        self._loop = asyncio.get_running_loop()
        self._outcome: asyncio.Future[None] = self._loop.create_future()
        """Done when everything was sent, or with the first error."""
        self._threads_ended: asyncio.Future[None] = self._loop.create_future()
        self._received_at = self._loop.time()
        self._owed_nothing_since = time.monotonic()
        self._ups = [
            _Up(each.up, ShareValidator(spec, plan, before_rows, number, self._count))
            for number, each in enumerate(connections)
        ]
        self._downs = [_Down(each.down) for each in connections]
        # A matrix without elements is complete, and no frame of it comes.
        self._ready_to_compute = self._ups[0].share.missing_before_rows is None
        """Whether the matrices before all rows are complete."""
        self._threads_open = 0

    async def run(self, idle_s: float) -> None:
        """Move all elements.

        Args:
            idle_s: Seconds that the client may neither send nor read.

        Raises:
            JobError: The operands are invalid, a connection broke, or the client was
                idle.
            Exception: The backend's error.
        """
        watch = asyncio.create_task(self._watch(idle_s))
        try:
            self._start_all()
            await self._outcome
        finally:
            watch.cancel()
            self._stop()
            await ended_threads(self._threads_ended)
        self._pipeline.tensors.commit()

    def end(self, m: int) -> None:
        """Take the call's End: the job has m rows.

        Raises:
            JobError: The direct connections have another number.
        """
        with self._lock:
            if self._m is not None and m != self._m:
                raise JobError(
                    Reason.M_MISMATCH,
                    f"end.m is {m}, but the job has {self._m} rows",
                    field="end.m",
                )
            self._m = m

    def hand_over(self) -> bool:
        """Make the job end with a checkpoint; see `StreamedJob.hand_over`."""
        with self._lock:
            if self._spec.checkpoint_rows is None or self._last_block_came():
                return False
            self._handed_over = True
            self._slots.stop()
        # The threads that receive end, and then use no memory of the job.
        for up in self._ups:
            up.sock.shutdown()
        return True

    def idle_since(self) -> float:
        """Return when the last operand came, by the event loop's clock; now: not yet.

        The call's End comes after it. Before, `run` itself notices an idle client. No
        End comes in a job that is handed over.
        """
        if self._handed_over or self._receiving():
            return self._loop.time()
        return self._received_at

    @property
    def receiving_s(self) -> float:
        """Seconds of waiting for and receiving operands, averaged over connections."""
        return sum(up.waited_s for up in self._ups) / self._count

    @property
    def sending_s(self) -> float:
        """Seconds of sending results, averaged over connections."""
        return sum(down.waited_s for down in self._downs) / self._count

    # The threads that receive.

    def _receive(self, up: _Up) -> None:
        share, sock = up.share, up.sock
        data = memoryview(bytearray(HEADER_BYTES))
        while True:
            with up:
                sock.receive(data)
            frame = FrameHeader.decode(data)
            if frame.kind == Kind.COMPLETE:
                self._complete_share(share, frame.position)
                return
            if frame.kind != Kind.ELEMENTS:
                raise malformed(f"a client's frame has kind {frame.kind}")
            span = share.accept(frame)
            number = span.block if span.in_row_block else None
            if number is not None:
                self._slots.wait_for(number)
            room = self._pipeline.memory.room(span, frame.length).data
            self._pipeline.observe(Stage.RECEIVING, number)
            with up:
                sock.receive(room)
            self._pipeline.observe(Stage.RECEIVING, number)
            check_crc32c(frame, room)
            complete = share.commit(span, frame.length)
            with self._lock:
                self._progress.bytes_received += frame.length
                if complete and number is None:
                    self._ready_to_compute = True
                elif complete and number is not None:
                    self._complete[number] = self._rows_of(number)
                if complete:
                    self._advance()

    def _complete_share(self, share: ShareValidator, m: int) -> None:
        rows = share.complete(m)
        with self._lock:
            if self._m is not None and m != self._m:
                raise JobError(
                    Reason.M_MISMATCH,
                    f"frame.index is {m}, the number of rows: another direct "
                    f"connection has {self._m}",
                    field="frame.index",
                )
            self._m = m
            if rows:
                self._complete[share.block] = rows
            self._shares_open -= 1
            if not self._shares_open:
                self._received_at = self._loop.time()
                self._progress.m = m
                self._progress.ended = True
            self._advance()

    def _rows_of(self, number: int) -> int:
        size = self._plan.block_rows
        return size if self._m is None else min(size, self._m - number * size)

    # What follows from what was received, computed and sent; with the lock held.

    def _advance(self) -> None:
        """Begin everything that can begin now; an error ends the job."""
        if self._stopped:
            return
        try:
            self._begin_next()
        except Exception as error:  # noqa: BLE001 - raised by `run`
            self._fail(error)

    def _begin_next(self) -> None:
        worker, pipeline = self._pipeline.worker, self._pipeline
        self._begin_segment_sums()
        while (
            self._ready_to_compute
            and not self._handed_over
            and self._segment_due is None
            and (rows := self._complete.pop(self._submitted, None)) is not None
        ):
            number = self._submitted
            block = pipeline.block(number, rows)
            self._submitted += 1
            self._progress.blocks_received += 1
            worker.begin_then(
                pipeline,
                partial(pipeline.compute, number, block),
                partial(self._block_computed, number, block),
            )
            if rows == self._plan.block_rows:
                self._begin_sums(self._submitted * rows)
        if self._last_sums_begun or self._computed < self._submitted:
            return
        if self._segment_due is not None:
            return  # further row blocks wait
        if self._handed_over:
            # The sums may take the memory of the row blocks.
            idle = self._slots.released == self._submitted and not self._receiving()
            if idle and not self._sums_open:
                self._last_sums_begun = True
                self._begin_last_checkpoint()
        elif not self._shares_open:
            if self._spec.segment_sums and not self._segments_sent():
                return
            self._last_sums_begun = True
            if self._spec.sums and not self._spec.segment_sums:
                worker.submit_then(pipeline, pipeline.finish, self._sums_computed)
            else:
                self._sums_computed({}, None)

    def _receiving(self) -> bool:
        return any(not up.ended for up in self._ups)

    def _last_block_came(self) -> bool:
        rows = self._m if not self._shares_open else self._spec.m
        return rows is not None and self._submitted * self._plan.block_rows >= rows

    def _begin_sums(self, rows: int) -> None:
        """Begin the sums over the submitted blocks, if they are due."""
        if self._spec.segment_sums:
            if not rows % self._plan.segment_rows:
                self._segment_due = rows
                self._begin_segment_sums()
        elif self._checkpoints.begin(rows):
            self._sums_open = True
            self._copy_sums(rows)

    def _begin_segment_sums(self) -> None:
        """Begin the sums of a segment that are due, once those of the last were sent.

        None is left out: until then, no further block is computed.
        """
        rows = self._segment_due
        if rows is None or self._sums_open:
            return
        self._segment_due = None
        self._segment_end = rows
        self._sums_open = True
        pipeline = self._pipeline
        then = partial(self._sums_copied, rows, False)
        pipeline.worker.submit_then(pipeline, pipeline.end_segment, then)

    def _segments_sent(self) -> bool:
        """Begin the sums of the last segment; return whether all sums were sent."""
        rows = self._m or 0
        if self._plan.computes and rows > self._segment_end:
            self._segment_due = rows
            self._begin_segment_sums()
        return not self._sums_open

    def _begin_last_checkpoint(self) -> None:
        rows = self._checkpoints.last_rows(self._submitted * self._plan.block_rows)
        if rows > self._checkpoints.rows:
            self._copy_sums(rows, last=True)
        else:
            self._hand_over_at(rows)

    def _copy_sums(self, rows: int, *, last: bool = False) -> None:
        pipeline = self._pipeline
        then = partial(self._sums_copied, rows, last)
        pipeline.worker.submit_then(pipeline, pipeline.copy_sums, then)

    # What the device worker's thread calls.

    def _block_computed(
        self, number: int, block: RowBlock, _: object, error: Exception | None
    ) -> None:
        if error is not None:
            self._fail(error)
            return
        silent = block.y is None and block.dx is None
        with self._lock:
            self._computed += 1
            if silent:
                self._slots.release(number)
                self._note_served()
            else:
                self._downs[number % self._count].put(_Results(number, block))
            self._advance()

    def _sums_copied(
        self, rows: int, last: bool, sums: Sums | None, error: Exception | None
    ) -> None:
        if error is not None or sums is None:
            self._fail(error)
            return
        self._downs[0].put(_Sums(sums, rows))
        if last:
            self._hand_over_at(rows)

    def _hand_over_at(self, rows: int) -> None:
        for down in self._downs:
            down.put(_HandedOver(rows))

    def _sums_computed(self, sums: Sums | None, error: Exception | None) -> None:
        if error is not None or sums is None:
            self._fail(error)
            return
        if sums:
            self._downs[0].put(_Sums(sums))
        for down in self._downs:
            down.put(_Complete())

    # The threads that send.

    def _send(self, down: _Down) -> None:
        while True:
            match down.items.get():
                case _Results(number, block):
                    first_row = number * self._plan.block_rows
                    arrays = (block.y, block.dx)
                    for matrix, array in zip(ROW_RESULTS, arrays, strict=True):
                        if array is not None:
                            chunks = self._pipeline.chunks(matrix, first_row, array)
                            self._send_chunks(down, chunks)
                    with self._lock:
                        self._slots.release(number)
                        self._note_served()
                        self._advance()
                case _Sums(sums, rows):
                    if rows is not None:
                        with down:
                            down.sock.send(
                                FrameHeader(Kind.CHECKPOINT, 0, rows).encode()
                            )
                    for matrix, array in sums.items():
                        name = matrix if rows is None else matrix.partial
                        chunks = self._pipeline.chunks(name, 0, array)
                        self._send_chunks(down, chunks)
                    if rows is not None:
                        with self._lock:
                            self._checkpoints.left()
                            self._sums_open = False
                            self._note_served()
                            self._advance()
                case _Complete():
                    with down:
                        down.sock.send(
                            FrameHeader(Kind.COMPLETE, 0, self._m or 0).encode()
                        )
                    return
                case _HandedOver(rows):
                    self._progress.handed_over = True
                    down.drain_point = DrainPoint(rows)
                    return
                case _:
                    return

    def _send_chunks(self, down: _Down, chunks: Iterable[Any]) -> None:
        for chunk in chunks:
            payload = chunk.payload
            crc = crc32c(payload) if self._spec.checksum else None
            header = FrameHeader(
                Kind.ELEMENTS, chunk.matrix, chunk.index, len(payload), crc
            )
            with down:
                down.sock.send(header.encode(), payload)
            with self._lock:
                self._progress.bytes_sent += len(payload)
            if (stages := self._progress.stages) is not None:
                stages.send.since(time.perf_counter())

    def _owes(self) -> bool:
        """Return whether the client may wait for results before it sends more."""
        owes_sums = self._spec.segment_sums and self._sums_open
        return owes_sums or self._slots.released < self._submitted

    def _note_served(self) -> None:
        if not self._owes():
            self._owed_nothing_since = time.monotonic()

    # The lives of the threads.

    def _start_all(self) -> None:
        """Start all threads; those that cannot start are over."""
        threads = [
            (up, partial(self._receive, up), f"gradwire-up-{number}")
            for number, up in enumerate(self._ups)
        ] + [
            (down, partial(self._send, down), f"gradwire-down-{number}")
            for number, down in enumerate(self._downs)
        ]
        self._threads_open = len(threads)
        for side, work, name in threads:
            thread = threading.Thread(
                target=self._run, args=(side, work), name=name, daemon=True
            )
            try:
                thread.start()
            except RuntimeError:  # the system has no more threads
                self._fail(busy("the process can start no more threads", "threads"))
                self._end(side)

    def _run(self, side: ThreadSide, work: Callable[[], None]) -> None:
        try:
            work()
        except Stopped:
            pass
        except Exception as error:  # noqa: BLE001 - raised by `run`
            # `hand_over` itself has closed the sockets for operands.
            if not (self._handed_over and is_broken(error)):
                self._fail(failure_of(error))
        self._end(side)

    def _end(self, side: ThreadSide) -> None:
        """Count a thread as over."""
        with self._lock:
            side.ended = True
            self._threads_open -= 1
            over = not self._threads_open
            if self._handed_over:
                self._advance()
        if over:
            self._in_loop(self._all_ended)

    def _all_ended(self) -> None:
        if not self._outcome.done():
            points = [each.drain_point for each in self._downs if each.drain_point]
            if points:
                self._outcome.set_exception(points[0].error())
            else:
                self._outcome.set_result(None)
        if not self._threads_ended.done():
            self._threads_ended.set_result(None)

    def _fail(self, error: Exception | None) -> None:
        """End the job with an error; the first counts."""

        def fail() -> None:
            if not self._outcome.done():
                self._outcome.set_exception(
                    error or RuntimeError("a row block has neither results nor error")
                )
                self._outcome.exception()

        self._in_loop(fail)

    def _in_loop(self, call: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:  # the loop is closed, and nobody waits
            return

    def _stop(self) -> None:
        """Make all threads end soon."""
        with self._lock:
            self._stopped = True
            self._slots.stop()
        for up in self._ups:
            if not up.ended:
                up.sock.shutdown()
        for down in self._downs:
            if not down.ended:
                down.sock.shutdown()
                down.put(None)

    async def _watch(self, idle_s: float) -> None:
        """End the job of a client that neither sends nor reads."""
        async for now in looks(idle_s, (*self._ups, *self._downs)):
            for down in self._downs:
                if now - down.idle_since(now) > idle_s:
                    self._fail(client_did_not_read(idle_s))
                    return
            with self._lock:
                owes = self._owes()
            if owes:
                continue
            for up in self._ups:
                since = max(up.idle_since(now), self._owed_nothing_since)
                if now - since > idle_s and not self._moves(now - idle_s):
                    self._fail(
                        client_sent_nothing(idle_s, "frames on direct connections")
                    )
                    return

    def _moves(self, since: float) -> bool:
        """Return whether operands have come on any connection.

        A client may send its connections by turns.
        """
        return any(up.sock.moved_at > since for up in self._ups)


class _Up(ThreadSide):
    def __init__(self, sock: DirectSocket, share: ShareValidator) -> None:
        super().__init__(sock)
        self.share = share


@dataclass(frozen=True, slots=True)
class _Results:
    number: int
    block: RowBlock


@dataclass(frozen=True, slots=True)
class _Sums:
    sums: Sums
    checkpoint_rows: int | None = None


@dataclass(frozen=True, slots=True)
class _Complete:
    pass


@dataclass(frozen=True, slots=True)
class _HandedOver:
    rows: int


_Item: TypeAlias = _Results | _Sums | _Complete | _HandedOver | None


class _Down(ThreadSide):
    def __init__(self, sock: DirectSocket) -> None:
        super().__init__(sock)
        self.items: SimpleQueue[_Item] = SimpleQueue()
        self.put = self.items.put
        self.drain_point: DrainPoint | None = None
