"""Whole calls against a live server, which answers every one of them in order.

A reference model says which streams are valid. Whatever comes: no call hangs,
none fails unforeseen, what was reserved is given back, and the next job is as
right as ever.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import grpc
from google.protobuf.message import DecodeError
from grpc import StatusCode

from gradwire.v1 import gradient_service_pb2 as service_pb2
from gradwire.v1 import job_pb2
from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.limits import MIB, SERVICE
from gradwire_server import Settings
from gradwire_server.embedded import start_in_thread
from gradwire_server.server import Server
from tests.contract.stream_machine import REFUSALS
from tests.contract.stream_model import StreamModel
from tests.support.raw import (
    CallError,
    Outcome,
    Problem,
    Stream,
    compute_job,
    result_dtype,
    whole_numbers,
)
from tests.thorough.fuzz.containers import Container, Ending, Method
from tests.thorough.fuzz.parsers import Check

ROW_BLOCK_BYTES = 256
IDLE_S = 1.0
NEVER_S = 10.0
"""A call that takes longer than this hangs."""
MOST_RESULTS = MIB
"""Bytes of results that are waited for: rows without elements cost the client
nothing, and may be worth terabytes of zeros."""
CONTROL = whole_numbers(9, 6, 5)
ANY_SERVER = "any"
"""Stands for a server's library where a job goes on."""


class LiveServer:
    """A server in this process, so that a fuzzer sees where its inputs lead."""

    def __init__(self, server: Server, channel: grpc.Channel) -> None:
        self._channel = channel
        service = server._service
        assert service is not None
        self._admission = service.admission
        self.troubles: list[logging.LogRecord] = []
        self._right = self._control()

    def check(self, data: bytes) -> None:
        """Makes the calls of a container, and looks whether all is well."""
        given = Container.unpacked(data)
        match given.method:
            case Method.STREAM:
                self._stream(given)
            case Method.COMPUTE:
                self._unary("Compute", given)
            case Method.REGION:
                self._unary("OpenRegion", given)
        self._settle()
        assert self._control() == self._right
        self._settle()
        assert not self.troubles, self.troubles[0].getMessage()

    def _control(self) -> dict[str, bytes]:
        return compute_job(self._channel, CONTROL).bits

    def _settle(self) -> None:
        """Waits until nothing is held: the end of a call is told a moment before."""
        deadline = time.monotonic() + NEVER_S
        while self._admission.held_bytes or self._admission.running:
            assert time.monotonic() < deadline, "memory was not given back"
            time.sleep(0.0005)

    def _unary(self, method: str, given: Container) -> None:
        call = self._channel.unary_stream(f"/{SERVICE}/{method}")(
            b"".join(given.messages), timeout=NEVER_S
        )
        try:
            answer = next(call)
            if method == "Compute":
                response = service_pb2.ComputeResponse.FromString(answer)
                assert response.receipt.m == response.accepted.effective_job.m
        except grpc.RpcError as error:
            assert_documented(CallError(error))
        finally:
            call.cancel()

    def _stream(self, given: Container) -> None:
        messages = self._of_this_server(given.messages)
        with Stream(self._channel, timeout_s=NEVER_S) as stream:
            stream.send(*messages)
            if given.ending is not Ending.SILENCE:
                stream.half_close()
            try:
                outcome = stream.receive_accepted()
            except CallError as failure:
                assert_documented(failure)
                return
            if given.ending is Ending.CANCEL or _is_too_much(outcome):
                stream.call.cancel()
                return
            self._answer(stream, outcome, given)

    def _of_this_server(self, messages: list[bytes]) -> list[bytes]:
        """The messages, where a job goes on that any server may have begun.

        What computes on another host is called otherwise, so inputs that are kept
        leave that to be filled in.
        """
        try:
            request = service_pb2.ComputeStreamRequest.FromString(messages[0])
        except (IndexError, DecodeError):
            return messages
        if request.job.resume.fingerprint.library != ANY_SERVER:
            return messages
        header = job_pb2.Job()
        header.CopyFrom(request.job)
        header.ClearField("resume")
        with Stream(self._channel, timeout_s=NEVER_S) as probe:
            probe.send(header)
            try:
                accepted = probe.receive_accepted().accepted
            except CallError:
                return messages
        self._settle()
        request.job.resume.fingerprint.CopyFrom(accepted.fingerprint)
        return [request.SerializeToString(), *messages[1:]]

    def _answer(self, stream: Stream, outcome: Outcome, given: Container) -> None:
        """The rest of the answers is what the model says."""
        job = outcome.accepted.effective_job
        model = StreamModel(outcome.accepted)
        if not _is_modelled(job):
            try:
                while stream.receive() is not None:
                    pass
            except CallError as failure:
                assert_documented(failure)
            return
        for message in given.messages[1:]:
            model.apply(message)
        if given.ending is Ending.HALF_CLOSE:
            model.close()
        if model.wrong:
            failure = stream.failure()
            assert_documented(failure)
            assert failure.status in REFUSALS, failure
            assert failure.reason in model.wrong, (failure, model.wrong)
        elif given.ending is Ending.SILENCE:
            assert stream.failure().reason == "CLIENT_IDLE"
        else:
            bits = stream.receive_results(outcome).bits
            assert outcome.receipt is not None
            assert outcome.receipt.m == model.m
            assert bits == self._clean(job, model.problem())

    def _clean(self, job: job_pb2.Job, problem: Problem) -> dict[str, bytes]:
        """The bits of a job's results when it is sent without any accident."""
        header = job_pb2.Job()
        header.CopyFrom(job)
        header.ClearField("checksum")
        with Stream(self._channel, timeout_s=NEVER_S) as stream:
            stream.send(header)
            outcome = stream.receive_accepted()
            stream.send_all(problem.body(outcome.accepted.block_rows))
            stream.half_close()
            return stream.receive_results(outcome).bits


def assert_documented(failure: CallError) -> None:
    """A failure has a reason of the contract, with the status that is its own."""
    reason = Reason[failure.reason]
    assert reason is not Reason.UNFORESEEN, failure
    assert failure.status is reason.status
    assert failure.status is not StatusCode.DEADLINE_EXCEEDED, failure
    assert failure.repeats_the_status


def _is_too_much(outcome: Outcome) -> bool:
    job = outcome.accepted.effective_job
    rows = job.m + outcome.accepted.block_rows
    sizes = {"y": rows * job.k, "dx": rows * job.n, "dw": job.n * job.k, "db": job.k}
    return any(
        job.HasField(name) and size * result_dtype(job, name).itemsize > MOST_RESULTS
        for name, size in sizes.items()
    )


_MODELLED = {
    *("job_id", "m", "n", "k", "dtype", "x", "w", "dy", "y", "dx", "dw", "db"),
    *("numerics", "checksum", "max_chunk_bytes"),
}


def _is_modelled(job: job_pb2.Job) -> bool:
    """Whether the model knows everything that the job asks for."""
    shared = any(
        getattr(job, name).HasField("shared")
        for name in ("x", "w", "dy", "y", "dx", "dw")
        if job.HasField(name)
    )
    fields = {field.name for field, _ in job.ListFields()}
    return not shared and fields <= _MODELLED


class Troubles(logging.Handler):
    """Keeps records of what nobody foresaw."""

    def __init__(self, found: list[logging.LogRecord]) -> None:
        super().__init__()
        self._found = found

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info or record.name == "asyncio":
            self._found.append(record)

    @classmethod
    @contextlib.contextmanager
    def watched(cls, found: list[logging.LogRecord]) -> Iterator[None]:
        """Keeps records within this context."""
        handler = cls(found)
        loggers = [logging.getLogger(name) for name in ("gradwire_server", "asyncio")]
        for logger in loggers:
            logger.addHandler(handler)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeHandler(handler)


@contextlib.contextmanager
def live_streams() -> Iterator[Check]:
    """Any messages, in any of the calls that take some."""
    with TemporaryDirectory(prefix="gradwire-fuzz-") as directory:
        settings = Settings(
            listen=(f"unix:{Path(directory) / 'socket'}",),
            backend="numpy",
            row_block_bytes=ROW_BLOCK_BYTES,
            memory_limit=64 * MIB,
            idle_timeout=IDLE_S,
            allow_shared_memory=True,
            keep_memory=False,
            grace=0.2,
        )
        with (
            # Every third stream is closed early, and would be waited for.
            mock.patch("gradwire_server.api.call_stream._CANCELLATION_S", 0.002),
            start_in_thread(settings) as server,
            grpc.insecure_channel(server.addresses[0]) as channel,
        ):
            live = LiveServer(server, channel)
            # The server collects garbage after each job that was cut off.
            gc.freeze()
            try:
                with Troubles.watched(live.troubles):
                    yield live.check
            finally:
                gc.unfreeze()
