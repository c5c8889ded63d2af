"""Streams of messages as the bytes that a fuzzer keeps and mutates.

    <control> { <length, 2 bytes> <message> }

Every string of bytes is one: a length that passes the end is cut, so that
nothing that the fuzzer comes up with is thrown away unused.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable
from dataclasses import dataclass

_LENGTH = struct.Struct(">H")


class Method(enum.IntEnum):
    """Which call is made."""

    STREAM = 0
    COMPUTE = 1
    REGION = 2


class Ending(enum.IntEnum):
    """What the client does when it has sent everything."""

    HALF_CLOSE = 0
    CANCEL = 1
    SILENCE = 2


@dataclass
class Container:
    """What a client, or a server, sends in one call."""

    method: Method
    ending: Ending
    messages: list[bytes]

    @classmethod
    def unpacked(cls, data: bytes) -> Container:
        """The one that these bytes are."""
        control = data[0] if data else 0
        messages, at = [], 1
        while at + _LENGTH.size <= len(data):
            (length,) = _LENGTH.unpack_from(data, at)
            at += _LENGTH.size
            messages.append(data[at : at + length])
            at += length
        return cls(
            Method(control % len(Method)),
            Ending(control // len(Method) % len(Ending)),
            messages,
        )

    def packed(self) -> bytes:
        """Its bytes."""
        control = self.method + len(Method) * self.ending
        return bytes([control]) + b"".join(
            _LENGTH.pack(len(message)) + message for message in self.messages
        )


def container(
    messages: Iterable[bytes],
    method: Method = Method.STREAM,
    ending: Ending = Ending.HALF_CLOSE,
) -> bytes:
    """The bytes of a container."""
    return Container(method, ending, list(messages)).packed()
