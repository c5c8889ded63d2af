"""A server that sends wrong frames is told as such, and nothing hangs."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import gradwire
from gradwire._transport.direct import transfer
from gradwire.v1.matrix_pb2 import MATRIX_DB_SUM, MATRIX_DW_SUM
from tests.support import oracle
from tests.support.behind_proxies import moving_threads
from tests.support.direct_client import CHECKPOINT, COMPLETE, ELEMENTS, frame
from tests.support.direct_proxy import DirectProxy, Edit
from tests.support.serving import running_server

X, W, DY = oracle.operands(100, 30, 20)


@pytest.fixture(scope="module")
def proxy() -> Iterator[tuple[DirectProxy, str]]:
    """It, and the address of the server behind it. Row blocks have 16 rows."""
    with (
        DirectProxy() as between,
        running_server(row_block_bytes=4096, data_advertise=between.address) as server,
    ):
        between.target = server.wait_for_log(lambda each: "data" in each)["data"]
        yield between, server.address


def before(sent: bytes, number: int = 1) -> Edit:
    """Something is sent before a frame."""
    return lambda at, own: sent + own if at == number else own


def instead(of: int, **fields: Any) -> Edit:
    """Some fields of one frame are others."""
    places = {"version": 4, "kind": 5, "matrix": 6, "flags": 7}
    longs = {"index": 16, "length": 24}

    def edit(at: int, own: bytes) -> bytes:
        if at != of:
            return own
        changed = bytearray(own)
        for name, value in fields.items():
            if name in places:
                changed[places[name]] = value
            else:
                struct.pack_into("<q", changed, longs[name], value)
        return bytes(changed)

    return edit


def complete_is(sent: bytes) -> Edit:
    """What comes in the place of COMPLETE."""
    return lambda _, own: sent if own[5] == COMPLETE else own


WRONG: dict[str, tuple[Edit, str]] = {
    "magic": (lambda _, own: b"HTTP" + own[4:], "sent no frame"),
    "version": (instead(1, version=2), "sent no frame"),
    "kind": (instead(1, kind=7), "sent no frame"),
    "flags": (instead(1, flags=2), "sent no frame"),
    "an-operand": (instead(1, matrix=1), "was not requested"),
    "not-wanted": (before(frame(ELEMENTS, "db", 0, bytes(80))), "was not requested"),
    "unknown": (instead(1, matrix=99), "matrix 99"),
    "index": (instead(1, index=1), "from element 1 on"),
    "twice": (lambda at, own: own + own if at == 1 else own, "from element"),
    "left-out": (lambda at, own: b"" if at == 1 else own, "the server sent"),
    "too-long": (
        lambda at, own: frame(ELEMENTS, own[6], 0, bytes(9000)) if not at else own,
        "at most",
    ),
    "longest": (instead(0, length=(4 << 20) + 4), "at most 4194304"),
    "negative": (instead(0, length=-4), "sent no frame"),
    "half": (
        lambda at, own: frame(ELEMENTS, own[6], 0, bytes(6)) if not at else own,
        "multiple of 4",
    ),
    "empty": (
        lambda at, own: frame(ELEMENTS, own[6], 0) if not at else own,
        "at least one element",
    ),
    "sums-early": (before(frame(ELEMENTS, "dw", 0, bytes(2400)), 0), "dw"),
    "a-checksum": (instead(0, flags=1), "checksum"),
    "a-checkpoint": (before(frame(CHECKPOINT, 0, 17)), "checkpoint"),
    "partial-sums": (before(frame(ELEMENTS, 7, 0, bytes(8))), ""),
    "complete-early": (before(frame(COMPLETE, 0, 100), 0), "without"),
    "complete-m": (complete_is(frame(COMPLETE, 0, 99)), "99 rows"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_frame_is_an_error_of_the_server(
    proxy: tuple[DirectProxy, str], name: str
) -> None:
    edit, says = WRONG[name]
    out = {"y": np.full((100, 20), 7, np.float32)}
    with gradwire.connect(proxy[1], transport="direct", timeout_s=20) as client:
        expected = client.gradients(X, W, DY)
        proxy[0].arm(edit)
        began = time.monotonic()
        with pytest.raises(gradwire.ProtocolError) as wrong:
            client.gradients(X, W, DY, out=out)
        assert time.monotonic() - began < 5
        assert says in str(wrong.value)
        assert not moving_threads()
        kept = out["y"].copy()
        proxy[0].arm(lambda _, own: own)
        assert oracle.same_bits(client.gradients(X, W, DY).dw, expected.dw)
        assert out["y"].tobytes() == kept.tobytes()


class SumsLater:
    """An edit that sends a checkpoint's sums behind the next frame of results."""

    def __init__(self) -> None:
        self.held = b""

    def __call__(self, number: int, own: bytes) -> bytes:
        if own[6] in {MATRIX_DW_SUM, MATRIX_DB_SUM}:
            self.held += own
            return b""
        held, self.held = self.held, b""
        return own + held


def test_a_checkpoint_without_its_sums_is_an_error_of_the_server(
    proxy: tuple[DirectProxy, str],
) -> None:
    with gradwire.connect(proxy[1], transport="direct", timeout_s=20) as client:
        for edit in SumsLater(), lambda at, own: b"" if own[6] > 6 else own:
            proxy[0].arm(edit)
            rows = ((X[at : at + 20], DY[at : at + 20]) for at in range(0, 100, 20))
            with (
                pytest.raises(gradwire.ProtocolError, match="complete a checkpoint"),
                client.stream(rows, W, checkpoint_rows=16) as stream,
            ):
                list(stream)
        proxy[0].arm(lambda _, own: own)


def test_results_that_never_come_are_a_lost_connection(
    proxy: tuple[DirectProxy, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call has ended well, and the last frame is missing."""
    monkeypatch.setattr(transfer, "_SILENCE_S", 1.0)
    with gradwire.connect(
        proxy[1], transport="direct", timeout_s=20, retries=False
    ) as client:
        proxy[0].arm(complete_is(b""))
        with pytest.raises(gradwire.ConnectionLostError):
            client.gradients(X, W, DY)
