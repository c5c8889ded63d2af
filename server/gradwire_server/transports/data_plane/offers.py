"""The calls that expect direct connections, and the sockets that came for them."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import socket
from collections.abc import Callable
from typing import NamedTuple

from gradwire_protocol.data_plane.frames import TOKEN_BYTES, Attach, Direction
from gradwire_protocol.data_plane.sockets import DirectSocket


class Connection(NamedTuple):
    """A direct connection of a call: two sockets that block, ready for frames."""

    up: DirectSocket
    """The client sends operands on it."""
    down: DirectSocket
    """The server sends results on it."""


class AttachRefusedError(Exception):
    """No call expects this socket."""


class Offer:
    """The connections that a call expects.

    Its methods are for the event loop's thread.

    Args:
        connections: Number of connections.
        forget: Called when no more sockets are expected.

    Attributes:
        token: The secret by which its sockets are known.
        connections: Number of connections.
    """

    def __init__(self, connections: int, forget: Callable[[], object]) -> None:
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self.connections = connections
        self._forget = forget
        self._came: dict[tuple[int, Direction], DirectSocket] = {}
        self._settled = asyncio.Event()
        self._withdrawn = False
        self._handed_out: list[Connection] | None = None

    @property
    def complete(self) -> bool:
        """Whether every socket has come."""
        return len(self._came) == len(Direction) * self.connections

    async def attached(self) -> list[Connection]:
        """Wait until every socket has come.

        Returns:
            The connections, in order of their numbers. They are the caller's from then
            on; another call returns the same.

        Raises:
            ConnectionAbortedError: The offer was withdrawn before.
        """
        await self._settled.wait()
        if self._handed_out is None:
            if self._withdrawn:
                raise ConnectionAbortedError("the direct connections were withdrawn")
            for each in self._came.values():
                each.set_blocking()
            self._handed_out = [
                Connection(self._came[i, Direction.UP], self._came[i, Direction.DOWN])
                for i in range(self.connections)
            ]
        return self._handed_out

    def withdraw(self) -> None:
        """Expect no more sockets; close those that `attached` has not returned."""
        if self._withdrawn:
            return
        self._withdrawn = True
        self._forget()
        if self._handed_out is None:
            for each in self._came.values():
                each.close()
        self._settled.set()

    def close(self) -> None:
        """Expect no more sockets, and close all that came."""
        self.withdraw()
        for each in self._came.values():
            each.close()

    def take(
        self, attach: Attach, sock: socket.socket, answer: Callable[[], object]
    ) -> DirectSocket:
        """Give the call a socket.

        Args:
            attach: Which of the call's sockets it is.
            sock: The socket; it is closed with the offer from then on.
            answer: Tells the client. If it raises, the socket stays the caller's.

        Raises:
            AttachRefusedError: The socket is none of those, or that one has come.
        """
        seat = attach.connection, attach.direction
        if attach.connection >= self.connections or seat in self._came:
            raise AttachRefusedError
        answer()
        taken = self._came[seat] = DirectSocket(sock)
        if self.complete:
            self._settled.set()
        return taken


class Offers:
    """The offers of all calls, by their tokens."""

    def __init__(self) -> None:
        self._offers: dict[bytes, Offer] = {}

    def add(self, connections: int) -> Offer:
        """Expect connections of a call."""
        offer = Offer(connections, lambda: self._offers.pop(key, None))
        key = _key(offer.token)
        self._offers[key] = offer
        return offer

    def find(self, attach: Attach) -> Offer:
        """Return the offer that a socket came for.

        Raises:
            AttachRefusedError: There is none.
        """
        offer = self._offers.get(_key(attach.token))
        if offer is None:
            raise AttachRefusedError
        return offer

    def withdraw_all(self) -> None:
        """Expect nothing more."""
        for offer in list(self._offers.values()):
            offer.withdraw()


def _key(token: bytes) -> bytes:
    """Return what a token is looked up by.

    How long a search takes may depend on the bytes in which two hashes agree; nobody
    can choose those.
    """
    return hashlib.sha256(token).digest()
