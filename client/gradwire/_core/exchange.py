"""The messages of one streamed job, without I/O.

A `JobExchange` yields the messages to send, and takes the received ones. Its driver
only transfers messages. The two directions may run in different threads: sending is a
chain of generators, receiving is one method, and each reads only counters of the other.

    exchange = JobExchange(plan, sender, sinks)
    send(exchange.opening())
    send everything of exchange.array_messages(operands), waiting where it is empty,
        while every message that comes goes to exchange.receive(message)
    receipt = exchange.finish()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Protocol

from gradwire._api.errors import ProtocolError
from gradwire._api.types import Array, Receipt, receipt_of
from gradwire._arrays.buffer_pool import ResultPool
from gradwire._arrays.operand import Operand
from gradwire._core.acceptance import check_accepted, check_receipt
from gradwire._core.direct_exchange import DirectExchange, RowSource
from gradwire._core.frame import Message
from gradwire._core.job_plan import Plan
from gradwire._core.progress import Reporter
from gradwire._core.receiver import Receiver, Sink
from gradwire._core.resume import (
    Checkpoints,
    ResumePoint,
    SegmentSums,
    point_after,
)
from gradwire._core.sender import WAIT, Sender
from gradwire_protocol import framing
from gradwire_protocol.limits import RESUME
from gradwire_protocol.matrices import PARTIAL_SUMS, ROW_OPERANDS, ROW_RESULTS, Matrix
from gradwire_protocol.v1.job_pb2 import Accepted, Checkpoint, DirectAccess, Queued
from gradwire_protocol.v1.job_pb2 import Receipt as ReceiptMessage


def decode_response(message: bytes, *, after_receipt: bool) -> framing.ResponseMessage:
    """Decode a message of the server.

    Args:
        message: The received bytes.
        after_receipt: Whether the job's receipt was received before.

    Raises:
        ProtocolError: The bytes are not a message, or come after the receipt.
    """
    try:
        received = framing.decode_response(message)
    except framing.FramingError as error:
        raise ProtocolError(f"the server sent an invalid message: {error}") from error
    if after_receipt:
        raise ProtocolError("the server sent a message after the job's receipt")
    return received


class ExchangeProtocol(Protocol):
    """The part of an exchange that a call needs."""

    def opening(self) -> bytes:
        """Return the first message."""


class JobExchange:
    """The client's side of a ComputeStream call.

    Args:
        plan: The job.
        sender: Makes the requests.
        sinks: Store the results.
        point: Where the job resumes; None: it starts at its beginning.
        checkpoint_rows: Minimum number of rows between checkpoints; 0: one, when the
            server stops; None: none.
        early_bytes: Most bytes of operands to send before the server has accepted the
            job. A job that resumes sends none.
        direct: Most direct connections for the elements; 0: they are in messages.
        segment_sums: Receives the sums of each segment, if the plan wants them.
        memory: Allocates those.
        segment_rows: Rows of a segment, for `on_segments`.
        on_segments: Called with the number of leading segments whose Y, dX and sums are
            all here, whenever that grows; in any thread, and perhaps with an earlier
            number after a later one. A short segment is complete at the job's end.

    Attributes:
        accepted: The server's Accepted, once received.
        offered: The direct connections that the server has offered, until
            `use_direct` or `use_messages` is called.
    """

    def __init__(
        self,
        plan: Plan,
        sender: Sender,
        sinks: Mapping[Matrix, Sink],
        *,
        point: ResumePoint | None = None,
        checkpoint_rows: int | None = None,
        early_bytes: int = 0,
        direct: int = 0,
        segment_sums: list[Mapping[Matrix, Array]] | None = None,
        memory: ResultPool | None = None,
        segment_rows: int = 0,
        on_segments: Callable[[int], object] | None = None,
    ) -> None:
        self.accepted: Accepted | None = None
        self.offered: DirectAccess | None = None
        self._plan = plan
        self._point = point
        self._segment_rows = segment_rows
        self._on_segments = on_segments
        self._complete_segments = 0
        self._checkpoints = Checkpoints(plan, point.checkpoint if point else None)
        self._segments: SegmentSums | None = None
        if plan.segment_rows:
            self._segments = SegmentSums(
                plan, [] if segment_sums is None else segment_sums, memory
            )
            self._checkpoints = self._segments
        self._takes_checkpoints = checkpoint_rows is not None and bool(plan.sums)
        spec = plan.spec()
        if self._takes_checkpoints or point is not None:
            spec = replace(
                spec,
                features=(*spec.features, RESUME),
                checkpoint_rows=checkpoint_rows if self._takes_checkpoints else None,
                resume=point.resume if point else None,
            )
        if spec.block_rows is not None and point is not None:
            # The first server may have had a smaller B than the job asked for, and
            # this one may have a larger.
            spec = replace(spec, block_rows=point.fingerprint.block_rows)
        if direct:
            spec = replace(spec, direct=direct)
        self._job = spec.to_message(plan.options.job_id)
        self._sender = sender
        self._of_messages = Receiver(plan, sinks, sender)
        self._receiver: Receiver | DirectExchange = self._of_messages
        self._sent_elsewhere: DirectExchange | None = None
        if point is None:
            # On direct connections the elements have to be in one order.
            sender.begin(0, 0 if direct else early_bytes)
        else:
            sender.begin(point.first_row)
        self._reporter = Reporter(plan)
        self._receipt: ReceiptMessage | None = None

    def opening(self) -> bytes:
        """Return the first message."""
        return framing.encode_job(self._job)

    def array_messages(self, operands: Mapping[Matrix, Operand]) -> Iterator[Message]:
        """Yield all messages after the first, for complete operands.

        At an empty message (`WAIT`), wait until another message was received.
        """
        rows = {m: operands[m] for m in ROW_OPERANDS if m in operands}
        yield from self._sender.opening()
        if self._sent_elsewhere is not None:
            yield from self._end_when_sent(self._sent_elsewhere)
            return
        yield from self.weight_messages(operands.get(Matrix.W))
        yield from self._reported(self._sender.all_rows(rows))
        yield from self._reported(self._sender.end())

    def segment_messages(
        self,
        operands: Mapping[Matrix, Operand],
        segments: Iterator[Mapping[Matrix, Operand] | None],
    ) -> Iterator[Message]:
        """Yield all messages after the first, for rows that come in segments.

        Args:
            operands: W, if the job needs it.
            segments: The rows of each; None: there are none yet.
        """
        yield from self._sender.opening()
        if self._sent_elsewhere is not None:
            yield from self._end_when_sent(self._sent_elsewhere)
            return
        yield from self.weight_messages(operands.get(Matrix.W))
        for rows in segments:
            if rows is not None:
                yield from self.row_messages(rows)
            else:
                yield from self._reported(self._sender.flush())
                yield WAIT
        yield from self.end_messages()

    def _end_when_sent(self, elsewhere: DirectExchange) -> Iterator[Message]:
        while not elsewhere.all_sent:
            yield WAIT
        yield from self._sender.end()

    def weight_messages(self, w: Operand | None) -> Iterator[Message]:
        """Yield the messages with W, if the job needs it.

        And behind it the sums with which the job goes on.
        """
        yield from self._sender.opening()
        if w is not None:
            yield from self._reported(self._sender.weights(w))
        if self._point is not None and self._point.checkpoint is not None:
            yield from self._sender.sums(self._point.checkpoint.sums)

    def row_messages(self, operands: Mapping[Matrix, Operand]) -> Iterator[Message]:
        """Yield the messages with the next rows of X and dY."""
        rows = {m: operands[m] for m in ROW_OPERANDS if m in operands}
        yield from self._reported(self._sender.rows(rows))

    def end_messages(self) -> Iterator[Message]:
        """Yield the messages that complete the job."""
        yield from self._reported(self._sender.last_rows())
        yield from self._reported(self._sender.end())

    def receive(self, message: bytes) -> None:
        """Process a message from the server.

        Raises:
            ProtocolError: The message violates the contract.
            ChecksumError: The payload was damaged in transit.
        """
        received = decode_response(message, after_receipt=self._receipt is not None)
        if isinstance(received, framing.Chunk):
            if self.accepted is None:
                raise ProtocolError("the server sent results before accepting the job")
            self._take(received)
        elif isinstance(received, Queued):
            self.report(jobs_ahead=received.jobs_ahead)
            return
        elif isinstance(received, Accepted):
            self._accept(received)
        elif isinstance(received, Checkpoint):
            self.begin_checkpoint(received.rows)
            return
        else:
            self._receipt = received
        self.report()

    def finish(self) -> Receipt:
        """Return the receipt, once the server has ended the stream with OK.

        Raises:
            ProtocolError: Results or the receipt are missing.
        """
        if self._receipt is None or self.accepted is None:
            raise ProtocolError("the server ended the job without a receipt")
        self._receiver.finish()
        if self._segments is not None:
            self._segments.require_all(self._sender.m or 0)
        check_receipt(self._receipt, self._job, self._sender.m)
        return receipt_of(self._receipt, self.accepted)

    def resume_point(self, results_row: int | None = None) -> ResumePoint | None:
        """Return where the interrupted job can resume; None: at its start.

        Args:
            results_row: Number of leading rows whose Y and dX are stored; None: the
                rows stored by this exchange.
        """
        if self.accepted is None or self._segments is not None:
            return self._point
        if results_row is None:
            self._receiver.flush()
            results_row = self._complete_row()
        checkpoint = self._checkpoints.within(results_row)
        return point_after(self._plan, self.accepted, results_row, checkpoint)

    @property
    def server_instance(self) -> str:
        """The server process that has accepted the job; empty: none yet."""
        return self.accepted.server_instance if self.accepted else ""

    @property
    def awaits_sums(self) -> bool:
        """Whether a checkpoint has begun, and its sums are not complete."""
        return self._checkpoints.coming

    def _note_segments(self) -> None:
        """Call `on_segments`, if more segments are complete."""
        on_segments, size = self._on_segments, self._segment_rows
        if on_segments is None or self.accepted is None:
            return
        counts = []
        if self._segments is not None:
            counts.append(self._segments.count)
        if (rows := self._complete_row()) is not None:
            counts.append(rows // size)
        count = min(counts, default=0)
        if count > self._complete_segments:
            self._complete_segments = count
            if self._receiver is self._of_messages:
                self._of_messages.flush()
            on_segments(count)

    @property
    def committed_rows(self) -> int:
        """Number of leading rows that are never needed again for dW."""
        if self._checkpoints.unsure:
            self._checkpoints.within(self._complete_row())
        return self._checkpoints.committed_rows

    def _complete_row(self) -> int | None:
        """Return the leading rows, in whole blocks, whose Y and dX were received.

        None if neither is wanted.
        """
        if not any(matrix in self._plan.results for matrix in ROW_RESULTS):
            return None
        complete = self._receiver.complete_row() or 0
        m, size = self._sender.m, self._sender.block_rows
        return complete if m is None else min(complete, m // size * size)

    def _accept(self, accepted: Accepted) -> None:
        if self.accepted is not None:
            raise ProtocolError("the server accepted the job twice")
        check_accepted(accepted, self._job, self._plan)
        point = self._point
        if point is not None and accepted.fingerprint != point.fingerprint:
            raise ProtocolError(
                "the server resumes the job with another fingerprint, contrary to the"
                " request"
            )
        self._of_messages.begin(point.results_from_row if point else 0)
        self._checkpoints.accept(accepted)
        self.accepted = accepted
        if accepted.HasField("direct"):
            self.offered = accepted.direct
        else:
            self.use_messages()

    def use_messages(self) -> None:
        """Send and receive the elements in messages of the call."""
        accepted, self.offered = self._required(), None
        self._sender.received_row = self._receiver.complete_row()
        # Sending goes on from here, perhaps in another thread.
        self._sender.accept(
            accepted.block_rows, accepted.window_rows, accepted.credit_blocks
        )

    def use_direct(
        self,
        sinks: Callable[[], Mapping[Matrix, Sink]],
        *,
        in_turn: bool = False,
        source: RowSource | None = None,
    ) -> DirectExchange:
        """Send and receive the elements on the direct connections in `offered`.

        Args:
            sinks: Makes the results' sinks, for each connection its own.
            in_turn: Whether the messages' iterators yield the frames, for the only
                connection. Otherwise `DirectExchange.frames` does.
            source: Where the rows come from; None: from arrays.
        """
        accepted, point, sender = self._required(), self._point, self._sender
        connections, self.offered = accepted.direct.connections, None
        sender.block_rows = accepted.block_rows
        direct = DirectExchange(
            self._plan,
            sender,
            sinks,
            self,
            connections=connections,
            checkpoint=point.checkpoint if point else None,
            results_from_row=point.results_from_row if point else 0,
            source=source,
        )
        self._receiver = direct
        if in_turn:
            sender.use_frames()
        else:
            self._sent_elsewhere = direct
        # The requests go on from here, perhaps in another thread.
        sender.accept(accepted.block_rows, accepted.window_rows)
        return direct

    def _required(self) -> Accepted:
        if self.accepted is None:
            raise RuntimeError("the server has not accepted the job")
        return self.accepted

    def take_sums(self, chunk: framing.Chunk) -> None:
        """Take elements of a checkpoint's sums.

        Raises:
            ProtocolError: They are not the next ones.
            ChecksumError: They were damaged in transit.
        """
        self._checkpoints.take(chunk)
        if self._segments is not None:
            self._sender.received_segments = self._segments.count
        if not self._checkpoints.coming:
            self._checkpoints.within(self._complete_row())
            self._note_segments()

    def _take(self, chunk: framing.Chunk) -> None:
        if self._receiver is not self._of_messages:
            raise ProtocolError(
                "the server sent elements in a message: expected them on direct"
                " connections"
            )
        if chunk.matrix in PARTIAL_SUMS:
            self.take_sums(chunk)
        elif self._checkpoints.coming:
            raise ProtocolError("the server did not complete a checkpoint")
        else:
            self._of_messages.take(chunk)
            before = self._sender.received_row
            self._sender.received_row = self._of_messages.complete_row()
            if self._sender.received_row != before:
                self._note_segments()

    def begin_checkpoint(self, rows: int) -> None:
        """Begin a checkpoint of the first rows.

        Raises:
            ProtocolError: It was not requested, or has an impossible number of rows.
        """
        wanted = self._takes_checkpoints or self._segments is not None
        if not wanted or self.accepted is None:
            raise ProtocolError("the server sent a checkpoint that was not requested")
        if self._checkpoints.coming:
            raise ProtocolError("the server did not complete a checkpoint")
        sender = self._sender
        self._checkpoints.begin(rows, sender.rows_sent, sender.block_rows, sender.m)

    def _reported(self, messages: Iterator[Message]) -> Iterator[Message]:
        for message in messages:
            yield message
            # A job that is not accepted yet waits, whatever it has sent.
            if message and self.accepted is not None:
                self.report()

    def received_block(self) -> None:
        """Note that all results of a row block were received."""
        self._note_segments()

    def report(self, jobs_ahead: int | None = None) -> None:
        """Report progress to the caller."""
        point, plan = self._point, self._plan
        bytes_sent = self._sender.bytes_sent
        bytes_received = self._receiver.bytes_received
        if point is not None and self.accepted is not None:
            # Elements that are not sent again count as sent.
            for matrix in plan.operands:
                if matrix is not Matrix.W:
                    bytes_sent += plan.size_bytes(matrix, point.first_row)
            for matrix in plan.results:
                if matrix.row_wise:
                    rows = min(point.results_from_row, self._sender.rows_sent)
                    bytes_received += plan.size_bytes(matrix, rows)
        self._reporter.report(
            bytes_sent=bytes_sent,
            bytes_received=bytes_received,
            rows_sent=self._sender.rows_sent,
            m=self._sender.m,
            jobs_ahead=jobs_ahead,
        )
