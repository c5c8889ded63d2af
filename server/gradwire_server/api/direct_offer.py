"""The direct connections that the server offers for one call."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from gradwire_protocol.limits import MAX_PAYLOAD_BYTES
from gradwire_protocol.v1 import job_pb2
from gradwire_server.api.call_stream import CallStream
from gradwire_server.jobs.stream.pipeline import RowBlockPipeline
from gradwire_server.transports.data_plane import Connection, DataListener, Offer

MAX_CONNECTIONS = 8
"""Most direct connections of one call: each has two threads."""


class DirectOffer:
    """An offer of direct connections, within this context.

    Args:
        listener: Where the server takes them; None: nowhere.
        connections: Number of connections; 0: the elements are in the call.

    Attributes:
        access: What the client is told; None: the elements are in the call.
    """

    def __init__(self, listener: DataListener | None, connections: int) -> None:
        self.access: job_pb2.DirectAccess | None = None
        self._count = connections
        self._listener = listener
        self._offer: Offer | None = None
        self._connections: list[Connection] = []

    def __enter__(self) -> Self:
        if self._listener is None or self._count <= 0:
            return self
        # The token must be known before the client is: it may be very fast.
        self._offer = self._listener.offer(self._count)
        self.access = job_pb2.DirectAccess(
            addresses=self._listener.addresses,
            token=self._offer.token,
            connections=self._offer.connections,
            tls=self._listener.tls,
            max_frame_bytes=MAX_PAYLOAD_BYTES,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._offer is not None:
            self._offer.close()

    async def taken(self, stream: CallStream, expected: str) -> list[Connection] | None:
        """Wait for the client's choice.

        Args:
            stream: The call.
            expected: What comes next, for the error if nothing does.

        Returns:
            The connections that the client has opened; None if it sends in the call.
        """
        if self._offer is None:
            return None
        connections = await stream.attached(self._offer, expected)
        if connections is None:
            self._offer.withdraw()
            return None
        self._connections = connections
        return connections

    def succeeded(self) -> None:
        """Keep the connections for the client's next call."""
        offer, self._offer = self._offer, None
        if self._listener is not None and offer is not None:
            offer.withdraw()
            self._listener.reuse(self._connections)


def connections_for(pipeline: RowBlockPipeline) -> int:
    """Return how many direct connections to offer for a job; 0: none."""
    spec = pipeline.spec
    rows_come = any(
        each.row_wise and spec.row_length(each) for each in spec.sent_operands
    )
    if not (spec.direct and rows_come and pipeline.plan.computes):  # nothing to gain
        return 0
    return min(spec.direct, MAX_CONNECTIONS)
