"""A client that makes any calls with a session, well or badly, and repeats some.

After each call, the server describes what the model says.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from gradwire.v1 import job_pb2
from gradwire.v1 import session_service_pb2 as pb2
from tests.contract.session_model import (
    GRADIENT,
    NUMBERS,
    WEIGHT,
    Kept,
    SessionModel,
    described,
    same_numbers,
)
from tests.contract.stream_machine import AnyStream, problems
from tests.support.raw import (
    DTYPES,
    NEEDS,
    CallError,
    Problem,
    Stream,
    dtype_number,
    whole_numbers,
)
from tests.support.sessions import (
    SESSION_SERVICE,
    RawSessions,
    chunks,
    header,
    into,
    kept,
    sent_and_kept,
)

M, N, K = 6, 3, 2
SHAPES = {"x": (M, N), "w": (N, K), "dy": (M, K), "dw": (N, K), "db": (1, K), "v": (K,)}
W, G, B, X, DY, OTHER = range(1, 7)
"""Tensors: a weight, its gradient and that of a bias, two operands of the backward
pass, and one more. Now and then a call takes one for another."""
KEEP_BYTES = 290
"""Less than what calls come to need."""

PROBLEM = whole_numbers(M, N, K)
LAYOUT = [
    (W, "w", WEIGHT),
    (G, "w", GRADIENT),
    (B, "v", GRADIENT),
    (OTHER, "x", WEIGHT),
]
ways = st.sampled_from(["compute", "stream"])
numbers = st.integers(W, OTHER)
parts = st.tuples(st.sampled_from([0, 0, 0, 0, 1, -1]), st.sampled_from([0] * 9 + [2]))
"""Of a contribution: how far from the next part, and how many it says there are."""


def usually(number: int) -> st.SearchStrategy[int]:
    return st.sampled_from([number] * 14 + [*range(W, OTHER + 1)])


anywhere = st.tuples(
    numbers, st.sampled_from(list(SHAPES)), st.sampled_from([WEIGHT, GRADIENT])
)
places = st.one_of(*[st.sampled_from(LAYOUT)] * 3, anywhere)


def operands(number: int) -> st.SearchStrategy[Any]:
    """How a job gets an operand."""
    sent = st.tuples(st.just("sent"))
    there = st.tuples(
        st.just("kept"), usually(number), st.sampled_from([number > B, 0])
    )
    if number == W:
        return st.one_of(sent, there)
    return st.one_of(sent, there, st.tuples(st.just("keep"), usually(number)))


def sums(number: int) -> st.SearchStrategy[Any]:
    """Where a job leaves a result."""
    add = st.tuples(st.just("add"), usually(number), parts)
    replace = st.tuples(st.just("replace"), usually(number))
    return st.one_of(st.none(), st.tuples(st.just("sent")), replace, add, add, add)


class AnySession(RuleBasedStateMachine):
    """Calls with one session."""

    channel: grpc.Channel

    @initialize()
    def begin(self):
        self.session = RawSessions(self.channel).open(KEEP_BYTES)
        self.model = SessionModel(KEEP_BYTES)
        self.again: Callable[[], None] | None = None
        for place in LAYOUT[:3]:
            self.put(place, place[2] == GRADIENT, 0, "float32", None)

    def _expect(self, wrong: set[str], call: Callable[[], Any]) -> Any:
        """A call's answer; None if it was refused for one of these reasons."""
        try:
            answer = call()
        except CallError as failure:
            assert failure.reason in wrong, (failure, wrong)  # noqa: PT017
            return None
        assert not wrong, wrong
        return answer

    def _matches(self) -> bool:
        return described(self.session.describe()) == self.model.described()

    def _wait_for_match(self, lost: set[int] | None = None) -> None:
        """Wait until a call's end has given its memory back.

        Args:
            lost: Tensors that may be gone.
        """
        deadline = time.monotonic() + 10
        while not self._matches():
            assert time.monotonic() < deadline
            now = described(self.session.describe())
            gone = (lost or set()) - {each[0] for each in now["tensors"]}
            if gone and now == self.model.described(without=gone):
                self.model.drop(gone)
                return
            time.sleep(0.001)

    # Tensors.

    @rule(
        place=places,
        zeros=st.booleans(),
        copy=st.sampled_from([0, 0, 0, 0, dtype_number("bfloat16")]),
        dtype=st.sampled_from(["float32"] * 7 + ["float64"]),
        cut=st.sampled_from([None, None, None, 0, 1]),
    )
    def put(self, place, zeros, copy, dtype, cut):
        number, what, role = place
        rng = np.random.default_rng(number)
        array = rng.integers(-4, 5, SHAPES[what]).astype(DTYPES[dtype])
        fields = {"tensor": number, "role": role, "compute_dtype": copy}
        first = header(array, session=self.session.token, zeros=zeros, **fields)
        messages = [pb2.PutTensorRequest(header=first)]
        if not zeros:
            messages += chunks(array, 12)
        self._put(messages, cut)

    @rule(
        number=usually(W),
        name=st.sampled_from(["momentum_buffer", "exp_avg"]),
        what=st.sampled_from(["w"] * 7 + ["x"]),
        updates=st.integers(0, 3),
    )
    def put_a_state(self, number, name, what, updates):
        array = np.ones(SHAPES[what], np.float32)
        fields = {"tensor": number, "state": name, "updates": updates}
        first = header(array, session=self.session.token, **fields)
        self._put([pb2.PutTensorRequest(header=first), *chunks(array)], None)

    def _put(self, messages: list[Any], cut: int | None) -> None:
        first = messages[0].header
        wrong = self._wrong_put(first)
        # With the last element, it may be there before it is cancelled.
        if cut is not None and len(messages) > 1 + cut:
            self._cancelled_put(messages[: 1 + cut], refused=bool(wrong))
            return

        def call() -> None:
            wrong = self._wrong_put(first)
            answer = self._expect(wrong, lambda: self.session.put_messages(messages))
            if answer is not None:
                self.model.put(first, b"".join(m.chunk.data for m in messages[1:]))
                assert answer.used_bytes == self.model.used_bytes

        self._run(call)

    def _cancelled_put(self, messages: list[Any], *, refused: bool) -> None:
        stub = self.channel.stream_stream(f"/{SESSION_SERVICE}/PutTensor")
        encoded = [each.SerializeToString() for each in messages]
        released = threading.Event()
        call = stub(_then_wait(encoded, released), timeout=10)
        try:
            while not refused and self._matches():  # its memory is not yet taken
                time.sleep(0.001)
        finally:
            call.cancel()
            released.set()
        self._wait_for_match()

    def _wrong_put(self, first: pb2.TensorHeader) -> set[str]:
        wrong = set()
        dtype, existing = NUMBERS[first.dtype], self.model.tensors.get(first.tensor)
        size = int(np.prod(first.shape))
        needed = size * dtype.itemsize
        if first.compute_dtype:
            needed += size * NUMBERS[first.compute_dtype].itemsize
            if first.dtype != dtype_number("float32"):
                wrong.add("DTYPE_INVALID")
        if self.model.used_bytes + needed > self.model.keep_bytes:
            wrong.add("SESSION_FULL")
        if not first.state:
            if existing is not None and existing.role != first.role:
                wrong.add("TENSOR_MISMATCH")
        elif existing is None:
            wrong.add("TENSOR_UNKNOWN")
        elif (
            existing.role != WEIGHT
            or existing.array.shape != tuple(first.shape)
            or existing.array.dtype != dtype
        ):
            wrong.add("TENSOR_MISMATCH")
        return wrong

    @rule(dropped=st.lists(numbers, max_size=2))
    def drop(self, dropped):
        self.model.drop(dropped)
        assert self.session.drop(*dropped) == self.model.used_bytes

    @rule(number=numbers)
    def get(self, number):
        expected = self.model.tensors.get(number)
        wrong = set() if expected else {"TENSOR_UNKNOWN"}
        answer = self._expect(wrong, lambda: self.session.get(number))
        if expected is not None:
            np.testing.assert_array_equal(answer, expected.array)
            assert answer.dtype == expected.array.dtype

    # Jobs.

    @rule(
        way=ways,
        x=operands(X),
        w=operands(W),
        dy=operands(DY),
        dw=sums(G),
        db=sums(B),
        step=st.sampled_from([0] * 10 + [1, -1]),
        cut=st.sampled_from([None] * 6 + [1, 3]),
    )
    def job(self, way, x, w, dy, dw, db, step, cut):
        step = max(0, self.model.step + step)
        fields: dict[str, Any] = {}
        for name, given in (("x", x), ("w", w), ("dy", dy)):
            if given[0] == "kept":
                fields[name] = kept(given[1], last_use=given[2])
            elif given[0] == "keep":
                fields[name] = sent_and_kept(given[1])
        results = ["y", "dx"]
        for name, given in (("dw", dw), ("db", db)):
            if given is None:
                continue
            results.append(name)
            if given[0] == "replace":
                fields[name] = into(given[1])
            elif given[0] == "add":
                offset, of = given[2]
                found = self.model.tensors.get(given[1])
                part = max(0, offset + (found.added if found else 0))
                if not of or part < of:
                    fields[name] = into(given[1], part, parts=of, step=step)
        used = [
            each.kept.tensor or getattr(each, "keep", each.kept).tensor
            for each in fields.values()
        ]
        if not fields or len(set(used)) < len(used):
            return
        problem = Problem(PROBLEM.x, PROBLEM.w, PROBLEM.dy, tuple(results))
        if cut is None:
            self._run(lambda: self._job(way, problem, fields))
        else:
            self._cancelled_job(problem, fields, cut)

    def _whole(self, problem: Problem, fields: dict[str, Any]) -> Problem:
        """The problem with the operands that the session has."""
        arrays = {}
        for name in ("x", "w", "dy"):
            arrays[name] = getattr(problem, name)
            if name in fields and fields[name].HasField("kept"):
                found = self.model.operand(fields[name].kept.tensor)
                assert found is not None
                arrays[name] = found.array
        return Problem(**arrays, results=problem.results)

    def _job(self, way: str, problem: Problem, fields: dict[str, Any]) -> None:
        header = problem.job(session=self.session.ref(), **fields)
        wrong = self.model.wrong_job(header)
        run = getattr(self.session, way)
        if wrong == {"SESSION_FULL"} or not wrong:
            # What was used up may be gone, or lie where others are to be kept.
            spare = self._uses_spare(header)
            if spare:
                wrong = wrong | {"TENSOR_UNKNOWN", "SESSION_FULL"}
        try:
            outcome = (
                run(problem, message_bytes=16, **fields)
                if way == "stream"
                else (run(problem, **fields))
            )
        except CallError as failure:
            assert failure.reason in wrong, (failure, wrong)  # noqa: PT017
            return
        assert not wrong or self._uses_spare(header), wrong
        whole = self._whole(problem, fields)
        expected = whole.expected()
        self.model.job(
            header,
            {name: getattr(problem, name) for name in ("x", "dy")},
            {n: expected[n] for n in fields if n in NEEDS},
            outcome.receipt.applied,
        )
        assert set(outcome.arrays) == set(problem.results) - set(fields)
        for name, array in outcome.arrays.items():
            # Steps make weights whose products are not exact.
            tolerance = 0.0 if name in {"dw", "db"} else 1e-5
            np.testing.assert_allclose(
                array, expected[name], rtol=tolerance, atol=100 * tolerance
            )

    def _uses_spare(self, header: job_pb2.Job) -> bool:
        return any(
            getattr(header, name).kept.tensor in self.model.spare
            and getattr(header, name).kept.tensor not in self.model.tensors
            for name in ("x", "w", "dy")
        )

    def _cancelled_job(
        self, problem: Problem, fields: dict[str, Any], messages: int
    ) -> None:
        """A job's stream is cut after so many messages."""
        header = problem.job(session=self.session.ref(), **fields)
        lost = self.model.may_be_lost(header)
        with Stream(self.channel, timeout_s=10) as stream:
            stream.send(header)
            try:
                outcome = stream.receive_accepted()
            except CallError as failure:
                wrong = self.model.wrong_job(header)
                assert wrong or self._uses_spare(header), failure  # noqa: PT017
                return
            body = problem.body(outcome.accepted.block_rows, 16)
            for _, message in zip(range(messages), body, strict=False):
                number = message.chunk.matrix
                name = {1: "x", 2: "w", 3: "dy"}.get(number)
                if name is None or not getattr(header, name).HasField("kept"):
                    stream.send(message)
        self._wait_for_match(lost)

    # What a good client does.

    @rule(way=ways)
    def forward(self, way):
        sent = ("sent",)
        self.job(way, ("keep", X), ("kept", W, False), sent, None, None, 0, None)

    @rule(
        way=ways,
        last_use=st.booleans(),
        early=st.sampled_from([0, 0, 1]),
        repeats=st.booleans(),
    )
    def backward(self, way, last_use, early, repeats):
        x = ("kept", X, last_use) if X in self.model.tensors else ("sent",)
        sums = [("add", number, (early, 0)) for number in (G, B)]
        self.job(way, x, ("kept", W, False), ("sent",), *sums, 0, None)
        if repeats:
            self.repeat_the_last_call(1)

    @rule(adam=st.booleans(), keep=st.booleans())
    def update(self, adam, keep):
        self.step(1, [(W, G)], adam, 0.5, keep)

    # Steps.

    @rule(
        offset=st.sampled_from([1, 1, 1, 1, 0, 2]),
        pairs=st.lists(
            st.tuples(usually(W), usually(G)), min_size=1, max_size=2, unique=True
        ),
        adam=st.booleans(),
        momentum=st.sampled_from([0.0, 0.5]),
        keep=st.booleans(),
    )
    def step(self, offset, pairs, adam, momentum, keep):
        parameters = [pb2.Parameter(weight=w, gradient=g) for w, g in pairs]
        group = pb2.ParameterGroup(parameters=parameters)
        if adam:
            group.adam.CopyFrom(pb2.Adam(lr=0.1, beta1=0.5, beta2=0.5, eps=1e-8))
        else:
            group.sgd.CopyFrom(pb2.Sgd(lr=1.0, momentum=momentum))
        request = pb2.StepRequest(
            session=self.session.token,
            step=max(0, self.model.step + offset),
            groups=[group],
            keep_gradients=keep,
        )
        self._run(lambda: self._step(request))

    def _step(self, request: pb2.StepRequest) -> None:
        wrong = self.model.wrong_step(request)
        answer = self._expect(wrong, lambda: self.session.call("Step", request))
        if answer is not None:
            self.model.step_made(request, answer, self._weights())

    def _weights(self) -> dict[int, Kept]:
        """The weights and their states, as they are."""
        return {
            number: Kept(
                WEIGHT,
                self.session.get(number),
                states={
                    name: self.session.get(number, state=name) for name in info.states
                },
            )
            for number, info in self.session.tensors().items()
            if info.header.role == WEIGHT
        }

    # Repetitions.

    def _run(self, call: Callable[[], None]) -> None:
        self.again = call
        call()

    @precondition(lambda self: self.again is not None)
    @rule(times=st.integers(1, 2))
    def repeat_the_last_call(self, times):
        """As a client does whose answer was lost."""
        for _ in range(times):
            assert self.again is not None
            self.again()

    @invariant()
    def the_server_says_the_same(self):
        assert described(self.session.describe()) == self.model.described()

    def teardown(self):
        if not hasattr(self, "model"):
            return
        for number, each in self.model.tensors.items():
            np.testing.assert_array_equal(self.session.get(number), each.array)
            for name, state in each.states.items():
                got = self.session.get(number, state=name)
                np.testing.assert_array_equal(got, state)
        self.session.close()


class AnySessionStream(AnyStream):
    """Writes the stream of a job with kept matrices, to a session of each server."""

    @initialize(
        problem=problems(),
        kept_operands=st.sets(st.sampled_from(["x", "w", "dy"]), max_size=2),
        keeps=st.sets(st.sampled_from(["x", "dy"])),
        adds=st.booleans(),
        checksum=st.booleans(),
        behaves=st.sampled_from([True, False]),
    )
    def begin(self, problem, kept_operands, keeps, adds, checksum, behaves):
        rows = [name for name in problem.operands if name != "w"]
        there = {
            name: getattr(problem, name)
            for name in problem.operands
            if name in kept_operands
        }
        keeps = {name for name in rows if name in keeps and name not in there}
        self.adds = adds and "dw" in problem.results
        if not (there or keeps or self.adds):
            keeps = {rows[0]}
        self.keeps = keeps
        tensors = {"x": X, "w": W, "dy": DY}
        fields = {name: kept(tensors[name]) for name in there}
        fields |= {name: sent_and_kept(tensors[name]) for name in keeps}
        if self.adds:
            fields["dw"] = into(G, 0)
        self.sessions, self.before, headers = [], [], []
        for channel in self.channels:
            session = RawSessions(channel).open()
            for name, array in there.items():
                session.put(tensors[name], array)
            session.zeros(G, problem.w.shape, dtype=dtype_number(problem.dtype))
            self.sessions.append(session)
            self.before.append(described(session.describe()))
            reference = session.ref()
            options = {"checksum": int(checksum), "job_id": "any"}
            headers.append(problem.job(session=reference, **options, **fields))
        self._begin(problem, headers, behaves, there)

    def teardown(self):
        super().teardown()
        if not hasattr(self, "model"):
            return
        for session, before in zip(self.sessions, self.before, strict=True):
            if self.model.wrong:
                assert described(session.describe()) == before
            else:
                self._assert_done(session)
            session.close()

    def _assert_done(self, session: RawSessions) -> None:
        came = self.model.problem()
        for name in self.keeps:
            got = session.get({"x": X, "dy": DY}[name])
            assert got.tobytes() == getattr(came, name).tobytes()
        if self.adds:
            assert list(session.tensors()[G].parts) == [0]
            if all(
                getattr(came, name).tobytes() == getattr(self.problem, name).tobytes()
                for name in ("x", "dy")
            ):  # others need not have exact sums
                assert same_numbers(session.get(G), came.expected()["dw"])


def _then_wait(messages: list[bytes], released: threading.Event) -> Iterator[bytes]:
    yield from messages
    released.wait(10)
