"""Bytes on the direct connections of a call to a live server.

The first message of an input chooses the job. Each one after it begins with a byte that
chooses the connection, and is sent there. Whatever comes: the call ends as the contract
says, what was reserved is given back, and the next job is as right as ever.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import time
from collections.abc import Iterator
from unittest import mock

import grpc

from gradwire_protocol.limits import MIB
from gradwire_server import Settings
from gradwire_server.embedded import start_in_thread
from gradwire_server.server import Server
from tests.support.direct_client import DirectCall, direct_job
from tests.support.raw import DTYPES, CallError, Problem, end, whole_numbers
from tests.thorough.fuzz.containers import Container, Ending
from tests.thorough.fuzz.parsers import Check
from tests.thorough.fuzz.streams import (
    IDLE_S,
    NEVER_S,
    ROW_BLOCK_BYTES,
    Troubles,
    assert_documented,
)

CONNECTIONS = 2
CONTROL = whole_numbers(20, 3, 2)
RESULTS: tuple[tuple[str, ...], ...] = (("y", "dx", "dw"), ("y",), ("dw",), ("db",))


def job_of(choice: int) -> tuple[Problem, dict[str, int | bool]]:
    """The job that a byte stands for, and its options."""
    dtype = [*DTYPES][choice % 4]
    problem = whole_numbers(20, 3, 2, dtype, RESULTS[choice // 4 % 4])
    return problem, {
        "checksum": choice // 16 % 2,
        "open_m": bool(choice // 32 % 2),
    }


class LiveServer:
    """A server in this process, so that a fuzzer sees where its inputs lead."""

    def __init__(self, server: Server, channel: grpc.Channel) -> None:
        self._channel = channel
        service = server._service
        assert service is not None
        self._admission = service.admission
        self.troubles: list[logging.LogRecord] = []
        self._right = direct_job(channel, CONTROL).bits

    def check(self, data: bytes) -> None:
        """Makes a call with the bytes of a container, and looks if all is well."""
        given = Container.unpacked(data)
        choice, *sent = given.messages or [b""]
        problem, options = job_of(choice[0] if choice else 0)
        with DirectCall(
            self._channel,
            problem,
            connections=CONNECTIONS,
            timeout_s=NEVER_S,
            **options,
        ) as call:
            call.attach()
            for each in sent:
                call.send(each[1:], each[0] % CONNECTIONS if each else 0)
            self._end(call, given.ending)
        self._settle()
        assert direct_job(self._channel, CONTROL).bits == self._right
        assert not self.troubles, self.troubles[0].getMessage()

    def _end(self, call: DirectCall, ending: Ending) -> None:
        if ending is Ending.CANCEL:
            call.stream.call.cancel()
            return
        call.stream.send(end(call.problem.shape[0]))
        call.stream.half_close()
        if ending is Ending.HALF_CLOSE:
            for each in call.ups:
                each.close()
        try:
            while call.stream.receive() is not None:
                pass
        except CallError as failure:
            assert_documented(failure)

    def _settle(self) -> None:
        deadline = time.monotonic() + NEVER_S
        while self._admission.held_bytes or self._admission.running:
            assert time.monotonic() < deadline, "memory was not given back"
            time.sleep(0.0005)


@contextlib.contextmanager
def live_connections() -> Iterator[Check]:
    """Any bytes, on the connections of a call."""
    settings = Settings(
        listen=("127.0.0.1:0",),
        backend="numpy",
        row_block_bytes=ROW_BLOCK_BYTES,
        memory_limit=64 * MIB,
        idle_timeout=IDLE_S,
        keep_memory=False,
        grace=0.2,
    )
    with (
        mock.patch("gradwire_server.api.call_stream._CANCELLATION_S", 0.002),
        mock.patch("gradwire_server.api.call_stream._LOST_S", 0.002),
        start_in_thread(settings) as server,
        grpc.insecure_channel(server.addresses[0]) as channel,
    ):
        live = LiveServer(server, channel)
        gc.freeze()
        try:
            with Troubles.watched(live.troubles):
                yield live.check
        finally:
            gc.unfreeze()
