"""PutTensor and GetTensor with direct connections, as a client without the SDK."""

from __future__ import annotations

import queue
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import google_crc32c
import grpc
import numpy as np

from gradwire.v1 import session_service_pb2 as pb2
from tests.support.direct_client import (
    ATTACHED,
    COMPLETE,
    DOWN,
    ELEMENTS,
    UP,
    attach,
    connect,
    frame,
    receive,
    receive_frame,
)
from tests.support.raw import DTYPES, TIMEOUT_S, CallError
from tests.support.sessions import MIB, SESSION_SERVICE, RawSessions, header


class Call:
    """A call with messages both ways.

    As a context manager, it cancels the call and closes its sockets.

    Args:
        channel: A channel.
        name: The method.
        response: Type of the server's messages.
    """

    def __init__(self, channel: grpc.Channel, name: str, response: Any) -> None:
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        method = channel.stream_stream(f"/{SESSION_SERVICE}/{name}")
        self.call = method(iter(self._outbox.get, None), timeout=TIMEOUT_S)
        self._response = response
        self.sockets: list[socket.socket] = []
        self.first: Any = None
        """The server's first message."""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        for each in self.sockets:
            each.close()
        self.call.cancel()
        self.half_close()

    def send(self, message: Any) -> None:
        self._outbox.put(message.SerializeToString())

    def half_close(self) -> None:
        self._outbox.put(None)

    def receive(self) -> Any:
        """The next message; None when the call has ended well."""
        try:
            message = next(self.call, None)
        except grpc.RpcError as error:
            raise CallError(error) from None
        return None if message is None else self._response.FromString(message)

    @property
    def access(self) -> Any:
        """What the server has offered; None: nothing."""
        return self.first.direct if self.first.HasField("direct") else None

    @property
    def up(self) -> socket.socket:
        return self.sockets[0]

    @property
    def down(self) -> socket.socket:
        return self.sockets[1]

    def attach(self, used: Sequence[socket.socket] = ()) -> Any:
        """Attach both sockets.

        Args:
            used: Sockets of a call that has ended; none: new ones.
        """
        port = int(self.access.addresses[0].rpartition(":")[2])
        self.sockets = list(used) or [connect(port), connect(port)]
        for direction, sock in zip((UP, DOWN), self.sockets, strict=True):
            sock.sendall(attach(direction, 0, self.access.token))
            assert receive(sock, len(ATTACHED)) == ATTACHED
        return self

    def attach_one(self) -> None:
        """Attach the first of both sockets only."""
        port = int(self.access.addresses[0].rpartition(":")[2])
        self.sockets = [connect(port)]
        self.up.sendall(attach(UP, 0, self.access.token))
        assert receive(self.up, len(ATTACHED)) == ATTACHED

    def keep_sockets(self) -> list[socket.socket]:
        """Leave the sockets open for another call."""
        sockets, self.sockets = self.sockets, []
        return sockets


class DirectPut(Call):
    """A PutTensor call that offers direct connections.

    Args:
        session: The session.
        tensor: Number of the tensor.
        array: Its elements.
        connections: How many are offered.
        fields: More fields of the header.
    """

    def __init__(
        self,
        session: RawSessions,
        tensor: int,
        array: np.ndarray,
        connections: int = 1,
        **fields: Any,
    ) -> None:
        super().__init__(session.channel, "PutTensor", pb2.PutTensorResponse)
        self._array = array
        given = {"session": session.token, "tensor": tensor} | fields
        self.header = header(array, **given)
        request = pb2.PutTensorRequest(header=self.header)
        request.direct.connections = connections
        self.send(request)
        self.first = self.receive()

    def frames(self, most: int = MIB) -> Iterator[bytes]:
        """What a good client sends.

        Args:
            most: Most bytes of a payload.
        """
        elements, step = self._array.reshape(-1), max(1, most // self._array.itemsize)
        for first in range(0, elements.size, step):
            payload = elements[first : first + step].tobytes()
            crc = google_crc32c.value(payload) if self.header.checksum else None
            yield frame(ELEMENTS, 0, first, payload, crc=crc)
        yield frame(COMPLETE, index=elements.size)

    def send_all(self, most: int = MIB) -> Any:
        """Send all elements; return the server's answer."""
        for each in self.frames(most):
            self.up.sendall(each)
        self.half_close()
        answer = self.receive()
        assert self.receive() is None
        return answer


class DirectGet(Call):
    """A GetTensor call that offers direct connections.

    Args:
        session: The session.
        tensor: Number of the tensor.
        connections: How many are offered.
        fields: More fields of the request.
    """

    def __init__(
        self, session: RawSessions, tensor: int, connections: int = 1, **fields: Any
    ) -> None:
        super().__init__(session.channel, "GetTensor", pb2.GetTensorResponse)
        request = pb2.GetTensorRequest(session=session.token, tensor=tensor, **fields)
        request.direct.connections = connections
        self._checksum = request.checksum
        self.send(request)
        self.first = self.receive()

    def frames(self) -> np.ndarray:
        """The elements on the connection, and the end of the call."""
        self.half_close()
        data, most = bytearray(), 0
        dtype = list(DTYPES.values())[self.first.header.dtype - 1]
        while (came := receive_frame(self.down)).kind != COMPLETE:
            assert (came.kind, came.matrix) == (ELEMENTS, 0)
            assert came.index * dtype.itemsize == len(data)
            if self._checksum:
                assert came.crc == google_crc32c.value(came.payload)
            else:
                assert came.crc is None
            data += came.payload
            most = max(most, len(came.payload))
        self.most = most
        assert self.receive() is None
        array = np.frombuffer(bytes(data), dtype)
        assert came.index == array.size
        return array.reshape(tuple(self.first.header.shape))

    def chunks(self) -> np.ndarray:
        """The elements in messages, and the end of the call."""
        dtype = list(DTYPES.values())[self.first.header.dtype - 1]
        data = bytearray()
        while (message := self.receive()) is not None:
            assert message.chunk.index * dtype.itemsize == len(data)
            data += message.chunk.data
        array = np.frombuffer(bytes(data), dtype)
        return array.reshape(tuple(self.first.header.shape))
