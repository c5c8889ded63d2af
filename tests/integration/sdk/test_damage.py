"""With `checksum=True`, a bit that flips on the way is never a wrong result."""

from __future__ import annotations

import contextlib
import socket
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import gradwire
from bench.relay import Link
from tests import oracle
from tests.serving import ServerProcess

M, N, K = 60, 6, 5
FLIPS = 100
"""Of each direction."""


class Damaging(Link):
    """A relay that flips one bit of each connection.

    Args:
        to: The server's address.
        direction: "up" or "down".
        offset: Byte of that direction in which it is; None: it flips none.
        bit: Which of the byte's bits.
    """

    def __init__(self, to: str, direction: str, offset: int | None, bit: int) -> None:
        self._flip = f"{direction}_bytes", offset, bit
        super().__init__(to)

    def _pump(self, source: socket.socket, sink: socket.socket, counter: str) -> None:
        direction, offset, bit = self._flip
        passed = 0
        with contextlib.suppress(OSError):  # cut
            while data := bytearray(source.recv(1 << 16)):
                if counter == direction and offset is not None:
                    at = offset - passed
                    if 0 <= at < len(data):
                        data[at] ^= 1 << bit
                passed += len(data)
                sink.sendall(data)
                setattr(self, counter, passed)
            sink.shutdown(socket.SHUT_WR)


def outcome(address: str, operands: Any, expected: Any) -> str:
    """What becomes of a job: "right", or the name of its error."""
    with gradwire.Client(address, transport="tcp") as client:
        try:
            came = client.gradients(*operands, checksum=True, timeout_s=2)
        except gradwire.GradwireError as error:
            return type(error).__name__
    assert all(map(oracle.same_bits, came, expected)), "wrong, and nothing was said"
    return "right"


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_flipped_bit_is_an_error_or_does_no_harm(
    small_blocks: ServerProcess, direction: str
) -> None:
    """Wherever it is: in HTTP/2's frames, headers, a job's sizes, elements."""
    to = small_blocks.addresses[0]
    operands = oracle.operands(M, N, K)
    with gradwire.Client(to, transport="tcp") as client:
        expected = client.gradients(*operands, checksum=True)
    with Damaging(to, direction, None, 0) as link:
        assert outcome(link.address, operands, expected) == "right"
        size = getattr(link, f"{direction}_bytes")
    rng = np.random.default_rng(11)
    offsets = rng.choice(size, FLIPS, replace=False)

    def one(offset: int) -> str:
        with Damaging(to, direction, offset, int(offset) % 8) as link:
            return outcome(link.address, operands, expected)

    with ThreadPoolExecutor(8) as pool:
        seen = Counter(pool.map(one, map(int, offsets)))
    # Most of what travels is elements.
    assert seen["ChecksumError"] > FLIPS / 4
    assert sum(seen.values()) == FLIPS
