"""Whole conversations about sessions with a live server.

An input is a container whose messages begin with a byte: the method that is called with
the message, whether it goes on with the call before, and how that call ends. Sessions
are named s1, s2 and so on, in the order in which they are opened.

The model of `tests.contract.session_model` follows: a call that succeeds has done what
the contract says, one that fails has changed nothing, and has a reason of the contract.
"""

from __future__ import annotations

import contextlib
import enum
import gc
import itertools
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest import mock

import google_crc32c
import grpc
import numpy as np
from google.protobuf.message import Message

from gradwire.v1 import gradient_service_pb2 as service_pb2
from gradwire.v1 import job_pb2, matrix_pb2
from gradwire.v1 import session_service_pb2 as pb2
from gradwire_protocol.limits import MIB, SERVICE, SESSION_SERVICE
from gradwire_server import Settings
from gradwire_server.embedded import start_in_thread
from gradwire_server.server import Server
from tests.contract.session_model import (
    GRADIENT,
    NUMBERS,
    OPERANDS,
    WEIGHT,
    Kept,
    SessionModel,
    described,
    same_numbers,
)
from tests.support.raw import (
    INLINE,
    NEEDS,
    CallError,
    compute_request,
    result_dtype,
)
from tests.support.sessions import RawSessions
from tests.thorough.fuzz.containers import Container
from tests.thorough.fuzz.parsers import Check
from tests.thorough.fuzz.streams import (
    IDLE_S,
    MOST_RESULTS,
    NEVER_S,
    ROW_BLOCK_BYTES,
    Troubles,
    assert_documented,
)

CONTINUES = 16
"""The message belongs to the call before."""
CANCELS = 32
"""The client cancels the call when it has sent everything, instead of half-closing."""


class Call(enum.IntEnum):
    """A method."""

    OPEN = 0
    RENEW = 1
    CLOSE = 2
    LIST = 3
    DESCRIBE = 4
    DROP = 5
    STEP = 6
    SAVE = 7
    GET = 8
    PUT = 9
    COMPUTE = 10
    STREAM = 11


METHODS = {
    Call.OPEN: ("OpenSession", pb2.OpenSessionRequest, pb2.OpenSessionResponse),
    Call.RENEW: ("RenewSession", pb2.RenewSessionRequest, pb2.RenewSessionResponse),
    Call.CLOSE: ("CloseSession", pb2.CloseSessionRequest, pb2.CloseSessionResponse),
    Call.LIST: ("ListSessions", pb2.ListSessionsRequest, pb2.ListSessionsResponse),
    Call.DESCRIBE: (
        "DescribeSession",
        pb2.DescribeSessionRequest,
        pb2.DescribeSessionResponse,
    ),
    Call.DROP: ("DropTensors", pb2.DropTensorsRequest, pb2.DropTensorsResponse),
    Call.STEP: ("Step", pb2.StepRequest, pb2.StepResponse),
    Call.SAVE: ("SaveSession", pb2.SaveSessionRequest, pb2.SaveSessionResponse),
    Call.GET: ("GetTensor", pb2.GetTensorRequest, pb2.GetTensorResponse),
    Call.PUT: ("PutTensor", pb2.PutTensorRequest, pb2.PutTensorResponse),
    Call.COMPUTE: ("Compute", service_pb2.ComputeRequest, service_pb2.ComputeResponse),
    Call.STREAM: (
        "ComputeStream",
        service_pb2.ComputeStreamRequest,
        service_pb2.ComputeStreamResponse,
    ),
}


def encoded(call: Call, content: Message, control: int = 0) -> bytes:
    """A message of a container."""
    return bytes([call + control]) + content.SerializeToString()


def kind_of(data: bytes) -> tuple[int, type[Message]]:
    """Where a message of a container begins, and what it is."""
    call = Call((data[0] if data else 0) % CONTINUES % len(Call))
    return 1, METHODS[call][1]


class LiveSessions:
    """A server in this process, so that a fuzzer sees where its inputs lead."""

    def __init__(
        self, server: Server, channel: grpc.Channel, numbers: list[Any]
    ) -> None:
        service = server._service
        assert service is not None
        self._admission = service.admission
        self._states = service.states
        self._channel = channel
        self._sessions = RawSessions(channel, timeout_s=NEVER_S)
        self._numbers = numbers
        self._models: dict[str, SessionModel] = {}
        self.troubles: list[logging.LogRecord] = []

    def check(self, data: bytes) -> None:
        """Makes the calls of a container, and looks whether all is well."""
        self._numbers[:] = [itertools.count(1), itertools.count(1)]
        self._models.clear()
        for call, cancels, messages in _calls(Container.unpacked(data).messages):
            self._make(call, messages, cancels=cancels)
        for name, model in self._models.items():
            self._compare(name, model)
            self._named(name).close()
        self._settle()
        assert not self.troubles, self.troubles[0].getMessage()

    def _named(self, name: str) -> RawSessions:
        return RawSessions(self._channel, name, NEVER_S)

    def _settle(self) -> None:
        """Waits until nothing is held: the end of a call is told a moment before."""
        deadline = time.monotonic() + NEVER_S
        while self._admission.held_bytes or self._admission.running:
            assert time.monotonic() < deadline, "memory was not given back"
            time.sleep(0.0005)

    def _make(self, call: Call, messages: list[bytes], *, cancels: bool) -> None:
        method, request_kind, response_kind = METHODS[call]
        service = SERVICE if call >= Call.COMPUTE else SESSION_SERVICE
        made = self._channel.stream_stream(f"/{service}/{method}")(
            iter(messages), timeout=NEVER_S
        )
        if cancels and call is not Call.OPEN:  # a lease would have to be waited for
            with contextlib.suppress(grpc.RpcError):
                if call is Call.STREAM:
                    next(made, None)  # Accepted, if it comes
                made.cancel()
                list(made)
            self._believe()
            return
        answers, size = [], 0
        try:
            for answer in made:
                answers.append(answer)
                size += len(answer)
                if size > MOST_RESULTS:
                    made.cancel()
        except grpc.RpcError as error:
            if size > MOST_RESULTS:
                self._believe()
                return
            failure = CallError(error)
            assert_documented(failure)
            if failure.reason == "STATE_NOT_SAVED":  # the step was made
                self._believe()
        else:
            if call not in {Call.PUT, Call.STREAM}:
                del messages[1:]  # which nobody has read
            requests = [request_kind.FromString(each) for each in messages]
            responses = [response_kind.FromString(each) for each in answers]
            getattr(self, f"_{call.name.lower()}")(requests, responses)
        for name, model in list(self._models.items()):
            try:
                now = described(self._named(name).describe())
            except CallError as gone:
                assert gone.reason == "SESSION_EXPIRED", gone  # noqa: PT017
                del self._models[name]
                continue
            assert now == model.described(), (call, now, model.described())

    # What calls that succeeded have done.

    def _open(self, requests: Any, responses: Any) -> None:
        (request,), (response,) = requests[:1], responses
        if not request.restore:
            self._models[response.session] = SessionModel(request.keep_bytes)
        else:
            self._models[response.session] = self._believed(response.session)

    def _renew(self, requests: Any, responses: Any) -> None:
        assert responses[0].step == self._models[requests[0].session].step

    def _close(self, requests: Any, responses: Any) -> None:
        if requests[0].session:
            self._models.pop(requests[0].session, None)
        elif requests[0].id:
            still = {
                each.id
                for each in self._sessions.call(
                    "ListSessions", pb2.ListSessionsRequest()
                ).sessions
            }
            assert requests[0].id not in still
            for name in list(self._models):
                if f"session-{name[1:]}" not in still:
                    del self._models[name]

    def _list(self, requests: Any, responses: Any) -> None:
        del requests
        for each in responses[0].sessions:
            model = self._models[f"s{each.id.removeprefix('session-')}"]
            assert (each.step, each.keep_bytes) == (model.step, model.keep_bytes)
            assert each.tensors == len(model.tensors)

    def _describe(self, requests: Any, responses: Any) -> None:
        model = self._models[requests[0].session]
        assert described(responses[0]) == model.described()

    def _drop(self, requests: Any, responses: Any) -> None:
        model = self._models[requests[0].session]
        model.drop(requests[0].tensors)
        assert responses[0].used_bytes == model.used_bytes

    def _step(self, requests: Any, responses: Any) -> None:
        (request,), (response,) = requests[:1], responses
        model = self._models[request.session]
        wrong = model.wrong_step(request)
        assert not wrong, wrong
        model.step_made(request, response, self._believed(request.session).tensors)

    def _save(self, requests: Any, responses: Any) -> None:
        named = requests[0].session or f"s{requests[0].id.removeprefix('session-')}"
        assert responses[0].step == self._models[named].step

    def _get(self, requests: Any, responses: Any) -> None:
        request = requests[0]
        tensor = self._models[request.session].tensors[request.tensor]
        expected = tensor.states[request.state] if request.state else tensor.array
        data = b"".join(each.chunk.data for each in responses[1:])
        got = np.frombuffer(data, expected.dtype).reshape(expected.shape)
        assert same_numbers(got, expected)

    def _put(self, requests: Any, responses: Any) -> None:
        first = requests[0].header
        model = self._models[first.session]
        data = b""
        for each in requests[1:]:
            assert each.WhichOneof("message") == "chunk", each
            assert each.chunk.index * NUMBERS[first.dtype].itemsize == len(data), each
            data += each.chunk.data
            checked = first.checksum == matrix_pb2.CHECKSUM_CRC32C
            assert each.chunk.HasField("crc32c") == checked, each
            if checked:
                assert each.chunk.crc32c == google_crc32c.value(each.chunk.data)
        model.put(first, data)
        *before, answer = responses
        assert len(before) <= requests[0].HasField("direct")
        assert all(each.accepted for each in before)
        assert answer.used_bytes == model.used_bytes

    def _compute(self, requests: Any, responses: Any) -> None:
        request, response = requests[0], responses[0]
        sent = {name: getattr(request, name) for name in OPERANDS}
        results = {name: getattr(response, name) for name in NEEDS}
        self._job(request.job, response.accepted, response.receipt, sent, results)

    def _stream(self, requests: Any, responses: Any) -> None:
        accepted, receipt = job_pb2.Accepted(), job_pb2.Receipt()
        results: dict[str, bytes] = dict.fromkeys(NEEDS, b"")
        sent: dict[str, bytes] = dict.fromkeys(OPERANDS, b"")
        for each in requests[1:]:
            if each.HasField("chunk"):
                sent[_name(each.chunk)] += each.chunk.data
        for each in responses:
            kind = each.WhichOneof("message")
            if kind == "chunk":
                if (name := _name(each.chunk)) in results:  # not a checkpoint's sums
                    results[name] += each.chunk.data
            elif kind == "accepted":
                accepted = each.accepted
            elif kind == "receipt":
                receipt = each.receipt
        self._job(requests[0].job, accepted, receipt, sent, results)

    def _job(
        self,
        job: job_pb2.Job,
        accepted: job_pb2.Accepted,
        receipt: job_pb2.Receipt,
        sent: dict[str, bytes],
        results: dict[str, bytes],
    ) -> None:
        if not job.HasField("session"):
            return  # as in `streams`
        model = self._models[job.session.session]
        wrong = model.wrong_job(job) - {"SESSION_FULL"}  # what it used up made room
        assert not wrong, wrong
        effective = accepted.effective_job
        shapes = {"x": (job.m, job.n), "w": (job.n, job.k), "dy": (job.m, job.k)}
        dtype, arrays = NUMBERS[job.dtype], {}
        for name, shape in shapes.items():
            operand = getattr(effective, name)
            if not effective.HasField(name):
                continue
            if operand.HasField("kept"):
                found = model.operand(operand.kept.tensor)
                assert found is not None
                if found.array.dtype != dtype:
                    # The copy for jobs: its rounding is tested elsewhere.
                    self._believe()
                    return
                arrays[name] = found.array
            else:
                arrays[name] = np.frombuffer(sent[name], dtype).reshape(shape)
        whole = self._without_a_session(effective, arrays)
        here = {}
        for name in NEEDS:
            if effective.HasField(name):
                if getattr(effective, name).HasField("kept"):
                    here[name] = whole[name]
                else:
                    assert results[name] == whole[name].tobytes(), name
        model.job(job, arrays, here, receipt.applied)

    def _without_a_session(
        self, job: job_pb2.Job, arrays: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """The results of the same job whose matrices are all sent."""
        plain = job_pb2.Job()
        plain.CopyFrom(job)
        plain.ClearField("session")
        for name in arrays:
            getattr(plain, name).CopyFrom(INLINE)
        for name in NEEDS:
            if job.HasField(name):
                dtype = getattr(job, name).dtype
                getattr(plain, name).CopyFrom(
                    job_pb2.Result(dtype=dtype, inline=job_pb2.InlineDestination())
                )
        request = service_pb2.ComputeRequest(job=plain)
        for name, array in arrays.items():
            setattr(request, name, array.tobytes())
        found = compute_request(self._channel, request, NEVER_S)
        assert all(a.dtype == result_dtype(job, n) for n, a in found.arrays.items())
        return found.arrays

    # Where the model cannot know.

    def _believe(self) -> None:
        """Takes what the server says, once its calls have ended."""
        deadline = time.monotonic() + NEVER_S
        while self._admission.running or self._admission.held_bytes != sum(
            model.keep_bytes for model in self._models.values()
        ):
            assert time.monotonic() < deadline, "memory was not given back"
            for name in list(self._models):
                with contextlib.suppress(CallError):
                    self._named(name).renew()
                    continue
                del self._models[name]
            time.sleep(0.001)
        for name, model in list(self._models.items()):
            step = model.step
            try:
                self._models[name] = self._believed(name)
            except CallError as gone:
                assert gone.reason in {"SESSION_UNKNOWN", "SESSION_EXPIRED"}  # noqa: PT017
                del self._models[name]
            else:
                assert self._models[name].step in {step, step + 1}

    def _believed(self, name: str) -> SessionModel:
        """A model of a session as the server describes it."""
        session = self._named(name)
        now = session.describe()
        model = SessionModel(now.keep_bytes)
        model.step = now.step
        if name in self._models:
            before = self._models[name]
            model.last, model.spare = before.last, before.spare
            if before.step != now.step:
                model.last = None
        for info in now.tensors:
            header = info.header
            kept = Kept(
                header.role,
                session.get(header.tensor),
                header.compute_dtype,
                header.name,
                {
                    state: session.get(header.tensor, state=state)
                    for state in info.states
                },
                info.updates,
            )
            before_kept = None
            if name in self._models:
                before_kept = self._models[name].tensors.get(header.tensor)
            if before_kept is not None:
                kept.kept_at = before_kept.kept_at
                kept.expected = before_kept.expected
            if header.role == GRADIENT:
                kept.empty = not kept.array.any() and not info.parts
                kept.added = len(info.parts)
            model.tensors[header.tensor] = kept
        return model

    def _compare(self, name: str, model: SessionModel) -> None:
        session = self._named(name)
        for number, each in model.tensors.items():
            assert same_numbers(session.get(number), each.array), number
            for state, array in each.states.items():
                assert same_numbers(session.get(number, state=state), array), state
            if each.role == WEIGHT and each.copy:
                assert session.tensors()[number].header.compute_dtype == each.copy


def _name(chunk: matrix_pb2.Chunk) -> str:
    return matrix_pb2.Matrix.Name(chunk.matrix)[7:].lower()


def _calls(messages: list[bytes]) -> Iterator[tuple[Call, bool, list[bytes]]]:
    calls: list[tuple[Call, bool, list[bytes]]] = []
    for each in messages:
        control = each[0] if each else 0
        if control & CONTINUES and calls:
            calls[-1][2].append(each[1:])
        else:
            call = Call(control % CONTINUES % len(Call))
            calls.append((call, bool(control & CANCELS), [each[1:]]))
    yield from calls


@contextlib.contextmanager
def live_sessions() -> Iterator[Check]:
    """Any calls with sessions."""
    numbers = [itertools.count(1), itertools.count(1)]
    named = SimpleNamespace(
        token_urlsafe=lambda _: f"s{next(numbers[0])}",
        token_hex=lambda _: f"{next(numbers[1])}",
    )
    with TemporaryDirectory(prefix="gradwire-fuzz-") as directory:
        settings = Settings(
            listen=(f"unix:{Path(directory) / 'socket'}",),
            backend="numpy",
            row_block_bytes=ROW_BLOCK_BYTES,
            memory_limit=64 * MIB,
            idle_timeout=IDLE_S,
            state_dir=Path(directory) / "states",
            keep_memory=False,
            grace=0.2,
        )
        with (
            mock.patch("gradwire_server.api.call_stream._CANCELLATION_S", 0.002),
            mock.patch("gradwire_server.api.call_stream._LOST_S", 0.002),
            mock.patch("gradwire_server.sessions.session.secrets", named),
            start_in_thread(settings) as server,
            grpc.insecure_channel(server.addresses[0]) as channel,
        ):
            live = LiveSessions(server, channel, numbers)
            with Troubles.watched(live.troubles):
                gc.freeze()
                try:
                    yield live.check
                finally:
                    gc.unfreeze()
