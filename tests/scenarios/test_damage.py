"""With `checksum=True`, a bit that flips on the way is never a wrong result."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import numpy as np
import pytest

import gradwire
from tests.support import oracle
from tests.support.proxy import Direction, Fault, Proxy
from tests.support.serving import ServerProcess

FLIPS = 60
"""Of each direction."""


def outcome(address: str, operands: Any, expected: Any) -> str:
    """What becomes of a job: "right", or the name of its error."""
    with closing(gradwire.Client(address, transport="grpc", retries=False)) as client:
        try:
            came = client.gradients(*operands, checksum=True, timeout_s=2)
        except gradwire.GradwireError as error:
            return type(error).__name__
    assert all(map(oracle.same_bits, came, expected)), "wrong, and nothing was said"
    return "right"


@pytest.mark.parametrize("direction", ["requests", "responses"])
def test_a_flipped_bit_is_an_error_or_does_no_harm(
    small_blocks: ServerProcess, direction: Direction
) -> None:
    """Wherever it is: in HTTP/2's frames, headers, a job's sizes, elements."""
    to = small_blocks.addresses[0]
    operands = oracle.operands(60, 6, 5)
    with gradwire.Client(to, transport="grpc") as client:
        expected = client.gradients(*operands, checksum=True)
    with Proxy(to) as proxy:
        assert outcome(proxy.address, operands, expected) == "right"
        size = proxy.bytes[direction]
    offsets = np.random.default_rng(11).choice(size, FLIPS, replace=False)

    def one(offset: int) -> str:
        with Proxy(to) as proxy:
            proxy.arm(Fault(of=direction, flip_byte=offset))
            return outcome(proxy.address, operands, expected)

    with ThreadPoolExecutor(8) as pool:
        seen = Counter(pool.map(one, map(int, offsets)))
    # Most of what travels is elements.
    assert seen["ChecksumError"] > FLIPS / 4
    assert sum(seen.values()) == FLIPS
