"""One job's conversation with the server, without the I/O.

An `Exchange` says what to send, and on which of the job's connections, and is
told what came on which; whoever drives it only pumps. The two directions may
run in different threads: sending is a chain of generators, for each
connection one, receiving is one method, and each looks at the other's
counters only.

    exchange = Exchange(plan, sender, sinks)
    send(exchange.opening())
    ... receive messages until exchange.accepted ...
    ... open the other connections, if there are any, and receive theirs ...
    send everything of exchange.array_messages(operands) once exchange.ready
        while every message that comes goes to exchange.receive(message)
    receipt = exchange.finish()
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol, TypeVar

from gradwire._arrays import Operand
from gradwire._echo import check_accepted, check_receipt
from gradwire._exceptions import ProtocolError
from gradwire._plan import Plan
from gradwire._receiving import Receiver, Sink
from gradwire._reporting import Reporter
from gradwire._resuming import Checkpoints, Point, point_after
from gradwire._sending import Sender
from gradwire._types import Receipt, receipt_of
from gradwire.v1.job_pb2 import Accepted, Checkpoint, Joined, Queued
from gradwire.v1.job_pb2 import Receipt as ReceiptMessage
from gradwire.wire import framing
from gradwire.wire.limits import CONNECTIONS, RESUME
from gradwire.wire.matrices import ROW_OPERANDS, ROW_RESULTS, Matrix

_Sent = TypeVar("_Sent")


class Conversation(Protocol):
    """What whoever pumps a stream's requests must know of it."""

    accepted: Accepted | None
    """What the server said when it took the job on."""

    def opening(self) -> bytes:
        """The first message; the next ones may go once `accepted` is set."""


class Exchange:
    """A job's calls, as its client sees them.

    Args:
        plan: The job.
        sender: What is sent.
        sinks: Where results go, for each connection: its own row blocks, and
            on the first dW too.
        point: Where the job goes on; None: it begins at its beginning.
        checkpoint_rows: How many rows there are at least between checkpoints;
            0: only the server's last one, should it stop; None: none.

    Attributes:
        accepted: What the server said when it took the job on.
        connections: How many calls there are.
    """

    def __init__(
        self,
        plan: Plan,
        sender: Sender,
        *sinks: Mapping[Matrix, Sink],
        point: Point | None = None,
        checkpoint_rows: int | None = None,
    ) -> None:
        self.accepted: Accepted | None = None
        self.connections = len(sinks)
        self._plan = plan
        self._job = plan.job()
        if self.connections > 1:
            self._job.connections = self.connections
            self._job.required_features.append(CONNECTIONS)
        self._point = point
        self._checkpoints = Checkpoints(plan, point.checkpoint if point else None)
        self._takes_checkpoints = False
        if checkpoint_rows is not None and Matrix.DW in plan.results:
            self._takes_checkpoints = True
            self._job.checkpoints.rows = checkpoint_rows
            self._job.checkpoints.SetInParent()
        if point is not None:
            point.write(self._job)
        elif self._takes_checkpoints:
            self._job.required_features.append(RESUME)
        self._sender = sender
        self._receivers = [
            Receiver(plan, those, sender, connection)
            for connection, those in enumerate(sinks)
        ]
        self._joined = {0}
        self._reporter = Reporter(plan)
        self._receipt: ReceiptMessage | None = None

    @property
    def ready(self) -> bool:
        """Whether every connection belongs to the job, so that all may send."""
        return self.accepted is not None and len(self._joined) == self.connections

    def opening(self, connection: int = 0) -> bytes:
        """A connection's first message.

        The first one's is due at once, those of the others once `accepted` is
        set; the next messages of all of them once they are `ready`.
        """
        if connection and self.accepted is not None:
            return framing.encode_join(self.accepted.join_token, connection)
        return framing.encode_job(self._job)

    def array_messages(
        self, operands: Mapping[Matrix, Operand], connection: int = 0
    ) -> Iterator[bytes]:
        """A connection's further messages, for operands that are all there."""
        rows = {m: operands[m] for m in ROW_OPERANDS if m in operands}
        if not connection:
            yield from self.weight_messages(operands.get(Matrix.W))
        yield from self._reported(self._sender.share(rows, connection))
        if not connection:
            yield from self._reported(self._sender.end())

    def weight_messages(self, w: Operand | None) -> Iterator[bytes]:
        """The messages that carry W, if the job needs it; on the first.

        And behind it the sum of dW with which the job goes on.
        """
        if w is not None:
            yield from self._reported(self._sender.weights(w))
        if self._point is not None and self._point.checkpoint is not None:
            yield from self._sender.dw_sum(self._point.checkpoint.dw)

    def row_messages(
        self, operands: Mapping[Matrix, Operand]
    ) -> Iterator[tuple[int, bytes]]:
        """The messages that carry the next rows of X and dY.

        Each with its connection.
        """
        rows = {m: operands[m] for m in ROW_OPERANDS if m in operands}
        yield from self._reported(self._sender.rows(rows))

    def end_messages(self) -> Iterator[tuple[int, bytes]]:
        """The messages that complete the job, each with its connection."""
        yield from self._reported(self._sender.last_rows())
        for message in self._reported(self._sender.end()):
            yield 0, message

    def receive(self, message: bytes, connection: int = 0) -> None:
        """Take a message from the server.

        Raises:
            ProtocolError: The contract does not allow it here.
            ChecksumError: Its payload was damaged on the way.
        """
        try:
            received = framing.decode_response(message)
        except framing.FramingError as error:
            raise ProtocolError(f"the server sent no message: {error}") from error
        if self._receipt is not None and not connection:
            raise ProtocolError("the server went on after the job's receipt")
        if isinstance(received, framing.Block):
            if self.accepted is None or connection not in self._joined:
                raise ProtocolError("the server sent results before it took the job on")
            self._take(received, connection)
        elif isinstance(received, Joined) or connection:
            self._join(received, connection)
            return
        elif isinstance(received, Queued):
            self._report(jobs_ahead=received.jobs_ahead)
            return
        elif isinstance(received, Accepted):
            self._accept(received)
        elif isinstance(received, Checkpoint):
            self._begin_checkpoint(received)
            return
        else:
            self._receipt = received
        self._report()

    def finish(self) -> Receipt:
        """The receipt, once the server has ended the stream with OK.

        Raises:
            ProtocolError: Something is missing.
        """
        if self._receipt is None or self.accepted is None:
            raise ProtocolError("the server ended the job without a receipt")
        for receiver in self._receivers:
            receiver.finish()
        check_receipt(self._receipt, self._job, self._sender.m)
        return receipt_of(self._receipt, self.accepted)

    def point(self, results_row: int | None = None) -> Point | None:
        """Where the job can go on that was cut off; None: at its beginning.

        Args:
            results_row: Rows of which Y and dX are where they belong; None:
                those that were taken here.
        """
        if self.accepted is None:
            return self._point
        if results_row is None:
            for receiver in self._receivers:
                receiver.flush()
            results_row = self._complete_row()
        checkpoint = self._checkpoints.within(results_row)
        return point_after(self._plan, self.accepted, results_row, checkpoint)

    @property
    def sure_rows(self) -> int:
        """Rows before which none is needed again for its share of dW."""
        if self._checkpoints.unsure:
            self._checkpoints.within(self._complete_row())
        return self._checkpoints.sure_rows

    def _complete_row(self) -> int | None:
        """Rows of which Y and dX are here, in whole blocks from the first on.

        None where neither is wanted.
        """
        if not any(matrix in self._plan.results for matrix in ROW_RESULTS):
            return None
        rows = [receiver.complete_row() for receiver in self._receivers]
        complete = min((row for row in rows if row is not None), default=0)
        m, size = self._sender.m, self._sender.block_rows
        return complete if m is None else min(complete, m // size * size)

    def _accept(self, accepted: Accepted) -> None:
        if self.accepted is not None:
            raise ProtocolError("the server took the job on twice")
        check_accepted(accepted, self._job)
        if self.connections > 1 and not accepted.join_token:
            raise ProtocolError("the server gave the job's connections no token")
        point = self._point
        if point is not None and accepted.fingerprint != point.fingerprint:
            raise ProtocolError(
                "the server lets the job go on where other bits come out, against what"
                " was asked"
            )
        first_row = point.first_row if point else 0
        self._sender.accept(accepted.block_rows, accepted.window_rows, first_row)
        for receiver in self._receivers:
            receiver.begin(point.results_from_row if point else 0)
        self._checkpoints.accept(accepted)
        self.accepted = accepted

    def _take(self, block: framing.Block, connection: int) -> None:
        if block.matrix == Matrix.DW_SUM and not connection:
            self._checkpoints.take(block)
            if not self._checkpoints.coming:
                self._checkpoints.within(self._complete_row())
        elif self._checkpoints.coming and not connection:
            raise ProtocolError("the server broke a checkpoint off")
        else:
            self._receivers[connection].take(block)

    def _begin_checkpoint(self, received: Checkpoint) -> None:
        if not self._takes_checkpoints or self.accepted is None:
            raise ProtocolError("the server sent a checkpoint that nobody asked for")
        if self._checkpoints.coming:
            raise ProtocolError("the server broke a checkpoint off")
        sender = self._sender
        self._checkpoints.begin(received.rows, sender.rows_sent, sender.block_rows)

    def _join(self, received: framing.ResponseMessage, connection: int) -> None:
        if not isinstance(received, Joined) or connection in self._joined:
            came = type(received).__name__.lower()
            raise ProtocolError(f"the server sent {came} on connection {connection}")
        self._joined.add(connection)

    def _reported(self, messages: Iterator[_Sent]) -> Iterator[_Sent]:
        for message in messages:
            yield message
            self._report()

    def _report(self, jobs_ahead: int | None = None) -> None:
        point, plan = self._point, self._plan
        bytes_sent = self._sender.bytes_sent
        bytes_received = sum(each.bytes_received for each in self._receivers)
        if point is not None and self.accepted is not None:
            # What need not travel again counts as if it had.
            for matrix in plan.operands:
                if matrix is not Matrix.W:
                    bytes_sent += plan.size_bytes(matrix, point.first_row)
            for matrix in plan.results:
                if matrix is not Matrix.DW:
                    rows = min(point.results_from_row, self._sender.rows_sent)
                    bytes_received += plan.size_bytes(matrix, rows)
        self._reporter.report(
            bytes_sent=bytes_sent,
            bytes_received=bytes_received,
            rows_sent=self._sender.rows_sent,
            m=self._sender.m,
            jobs_ahead=jobs_ahead,
        )
