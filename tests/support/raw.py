"""The contract spoken as any language would: generated classes and gRPC alone.

Nothing here comes from the SDK or from `gradwire_protocol`, so that a mistake
that both of them share shows.
"""

from __future__ import annotations

import itertools
import queue
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import ml_dtypes
import numpy as np
from google.rpc import error_details_pb2, status_pb2

from gradwire.v1 import gradient_service_pb2 as service_pb2
from gradwire.v1 import job_pb2, matrix_pb2

SERVICE = "gradwire.v1.GradientService"
TIMEOUT_S = 20.0

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
NEEDS = {"y": ("x", "w"), "dx": ("dy", "w"), "dw": ("x", "dy"), "db": ("dy",)}
INLINE = job_pb2.Operand(inline=job_pb2.InlineSource())
Request = service_pb2.ComputeStreamRequest
Response = service_pb2.ComputeStreamResponse


class CallError(Exception):
    """A call that ended with an error, taken apart as a stock client would."""

    def __init__(self, error: grpc.RpcError) -> None:
        self.status: grpc.StatusCode = error.code()
        self.text: str = error.details() or ""
        self.reason = ""
        self.metadata: dict[str, str] = {}
        self.fields: dict[str, str] = {}
        self.retry_after_s: float | None = None
        trailers = dict(error.trailing_metadata() or ())
        packed = status_pb2.Status.FromString(
            trailers.get("grpc-status-details-bin", b"")
        )
        self.repeats_the_status = (packed.code, packed.message) == (
            self.status.value[0],
            self.text,
        )
        for part in packed.details:
            self._take(part)
        super().__init__(f"{self.status.name}, {self.reason}: {self.text}")

    def _take(self, part: Any) -> None:
        info = error_details_pb2.ErrorInfo()
        bad_request = error_details_pb2.BadRequest()
        retry = error_details_pb2.RetryInfo()
        if part.Unpack(info):
            assert info.domain == "gradwire"
            self.reason = info.reason
            self.metadata = dict(info.metadata)
        elif part.Unpack(bad_request):
            self.fields = {v.field: v.description for v in bad_request.field_violations}
        elif part.Unpack(retry):
            self.retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9


def server_info(channel: grpc.Channel) -> service_pb2.GetServerInfoResponse:
    """The answer to GetServerInfo."""
    method = channel.unary_unary(f"/{SERVICE}/GetServerInfo")
    answer = method(service_pb2.GetServerInfoRequest().SerializeToString(), timeout=10)
    return service_pb2.GetServerInfoResponse.FromString(answer)


def matrix_number(name: str) -> int:
    return matrix_pb2.Matrix.Value(f"MATRIX_{name.upper()}")


def dtype_number(name: str) -> int:
    return matrix_pb2.Dtype.Value(f"DTYPE_{name.upper()}")


def result(dtype: str | None = None) -> job_pb2.Result:
    return job_pb2.Result(
        dtype=dtype_number(dtype) if dtype else matrix_pb2.DTYPE_UNSPECIFIED,
        inline=job_pb2.InlineDestination(),
    )


def make_job(
    *,
    m: int | None = 6,
    n: int = 5,
    k: int = 4,
    dtype: str = "float32",
    results: Sequence[str] | Mapping[str, str | None] = ("y", "dx", "dw"),
    **options: Any,
) -> job_pb2.Job:
    """A valid header; `options` are further fields of Job."""
    wanted = results if isinstance(results, Mapping) else dict.fromkeys(results)
    operands = {operand for name in wanted for operand in NEEDS[name]}
    fields: dict[str, Any] = dict.fromkeys(operands, INLINE)
    fields |= {name: result(asked) for name, asked in wanted.items()}
    fields |= {"m": m, "n": n, "k": k, "dtype": dtype_number(dtype)}
    return job_pb2.Job(**(fields | options))


def chunk(
    matrix: str | int, index: int, data: bytes | None = b"", crc32c: int | None = None
) -> service_pb2.ComputeStreamRequest:
    number = matrix_number(matrix) if isinstance(matrix, str) else matrix
    return Request(
        chunk=matrix_pb2.Chunk(matrix=number, index=index, data=data, crc32c=crc32c)
    )


def end(m: int) -> service_pb2.ComputeStreamRequest:
    return Request(end=job_pb2.End(m=m))


@dataclass(frozen=True)
class Problem:
    """Operands, and what is wanted of them."""

    x: np.ndarray
    w: np.ndarray
    dy: np.ndarray
    results: tuple[str, ...] = ("y", "dx", "dw")

    @property
    def dtype(self) -> str:
        return self.x.dtype.name

    @property
    def shape(self) -> tuple[int, int, int]:
        """m, n, k."""
        return self.x.shape[0], *self.w.shape

    @property
    def operands(self) -> tuple[str, ...]:
        needed = {operand for name in self.results for operand in NEEDS[name]}
        return tuple(name for name in ("x", "w", "dy") if name in needed)

    def job(self, *, open_m: bool = False, **options: Any) -> job_pb2.Job:
        m, n, k = self.shape
        fields = {"m": None if open_m else m, "n": n, "k": k, "dtype": self.dtype}
        return make_job(**(fields | {"results": self.results} | options))

    def body(
        self, turn_rows: int, message_bytes: int = 1 << 20
    ) -> Iterator[service_pb2.ComputeStreamRequest]:
        """W, then `turn_rows` rows of X and as many of dY in turn, then End."""
        m = self.shape[0]
        if "w" in self.operands:
            yield from self.chunks("w", 0, self.w.shape[0], message_bytes)
        for first in range(0, m, turn_rows):
            for name in ("x", "dy"):
                if name in self.operands:
                    last = min(m, first + turn_rows)
                    yield from self.chunks(name, first, last, message_bytes)
        yield end(m)

    def chunks(
        self, name: str, first_row: int, last_row: int, message_bytes: int = 1 << 20
    ) -> Iterator[service_pb2.ComputeStreamRequest]:
        """Rows of one operand, cut where messages are full."""
        operand = getattr(self, name)
        elements = operand.reshape(-1)
        per_message = max(1, message_bytes // operand.itemsize)
        columns = operand.shape[1]
        stop = last_row * columns
        for at in range(first_row * columns, stop, per_message):
            data = elements[at : min(at + per_message, stop)].tobytes()
            yield chunk(name, at, data)

    def compute_request(self, **options: Any) -> service_pb2.ComputeRequest:
        """The same job as one message."""
        return service_pb2.ComputeRequest(
            job=self.job(**options),
            **{name: getattr(self, name).tobytes() for name in self.operands},
        )

    def expected(self, **dtypes: str) -> dict[str, np.ndarray]:
        """The results by float64; exact for operands of small whole numbers."""
        x, w, dy = (a.astype(np.float64) for a in (self.x, self.w, self.dy))
        exact = {"y": x @ w, "dx": dy @ w.T, "dw": x.T @ dy}
        exact["db"] = dy.sum(axis=0, keepdims=True)
        return {
            name: exact[name].astype(DTYPES[dtypes.get(name, self.dtype)])
            for name in self.results
        }


def whole_numbers(
    m: int,
    n: int,
    k: int,
    dtype: str = "float32",
    results: tuple[str, ...] = ("y", "dx", "dw"),
    seed: int = 0,
) -> Problem:
    """A problem of numbers so small that every sum is exact in float32."""
    random = np.random.default_rng(seed)
    x, w, dy = (
        random.integers(-4, 5, shape).astype(DTYPES[dtype])
        for shape in ((m, n), (n, k), (m, k))
    )
    return Problem(x, w, dy, results)


def normal_numbers(
    m: int, n: int, k: int, dtype: str = "float32", seed: int = 0
) -> Problem:
    """A problem whose results' last bits depend on the order of sums."""
    random = np.random.default_rng(seed)
    x, w, dy = (
        random.standard_normal(shape).astype(DTYPES[dtype])
        for shape in ((m, n), (n, k), (m, k))
    )
    return Problem(x, w, dy)


def repeated_rows(problem: Problem, times: int | None) -> Iterator[Request]:
    """W, then all rows of a problem again and again, then End.

    Args:
        problem: Its rows are one turn.
        times: How often; None for ever.
    """
    if "w" in problem.operands:
        yield from problem.chunks("w", 0, problem.w.shape[0])
    turn = [
        message
        for name in ("x", "dy")
        if name in problem.operands
        for message in problem.chunks(name, 0, problem.shape[0])
    ]
    sizes = {matrix_number(name): getattr(problem, name).size for name in ("x", "dy")}
    for _ in range(times) if times is not None else itertools.count():
        yield from turn
        for message in turn:
            message.chunk.index += sizes[message.chunk.matrix]
    yield end((times or 0) * problem.shape[0])


@dataclass
class Outcome:
    """What a server answered, put together."""

    accepted: job_pb2.Accepted
    queued: list[int] = field(default_factory=list)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    order: list[tuple[str, int, int]] = field(default_factory=list)
    """Result, first element and number of elements of each Chunk."""
    receipt: job_pb2.Receipt = field(default_factory=job_pb2.Receipt)

    @property
    def bits(self) -> dict[str, bytes]:
        return {name: array.tobytes() for name, array in self.arrays.items()}


class Stream:
    """One ComputeStream call over bytes, so that wrong ones can be sent too.

    Args:
        channel: A channel, with whatever options.
        timeout_s: The call's deadline.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        *,
        timeout_s: float = TIMEOUT_S,
        metadata: tuple[tuple[str, str], ...] = (),
    ) -> None:
        self._outbox: queue.SimpleQueue[Iterable[Any] | None] = queue.SimpleQueue()
        method = channel.stream_stream(f"/{SERVICE}/ComputeStream")
        self.call = method(self._requests(), timeout=timeout_s, metadata=metadata)
        self.outcome: Outcome | None = None

    def _requests(self) -> Iterator[bytes]:
        for batch in iter(self._outbox.get, None):
            for message in batch:
                if isinstance(message, job_pb2.Job):
                    yield Request(job=message).SerializeToString()
                elif isinstance(message, Request):
                    yield message.SerializeToString()
                else:
                    yield message

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.call.cancel()
        self.half_close()

    def send(self, *messages: Any) -> None:
        """Queues messages: a Job, a ComputeStreamRequest, or bytes."""
        self._outbox.put(messages)

    def send_all(self, messages: Iterable[Any]) -> None:
        """Queues messages that are made as they are sent."""
        self._outbox.put(messages)

    def half_close(self) -> None:
        self._outbox.put(None)

    def receive(self) -> service_pb2.ComputeStreamResponse | None:
        """The next message; None when the call has ended well."""
        try:
            message = next(self.call, None)
        except grpc.RpcError as error:
            raise CallError(error) from None
        return None if message is None else Response.FromString(message)

    def receive_accepted(self) -> Outcome:
        """Reads up to Accepted."""
        queued: list[int] = []
        while True:
            message = self.receive()
            assert message is not None
            if message.WhichOneof("message") == "accepted":
                self.outcome = Outcome(message.accepted, queued)
                return self.outcome
            assert message.WhichOneof("message") == "queued"
            queued.append(message.queued.jobs_ahead)

    def receive_results(self, outcome: Outcome) -> Outcome:
        """Reads to the end of the call and puts the results together."""
        job = outcome.accepted.effective_job
        parts: dict[str, list[bytes]] = {
            name: [] for name in NEEDS if is_sent(job, name)
        }
        received = dict.fromkeys(parts, 0)
        while True:
            message = self.receive()
            assert message is not None
            if message.WhichOneof("message") == "receipt":
                break
            assert message.WhichOneof("message") == "chunk"
            name = matrix_pb2.Matrix.Name(message.chunk.matrix)[7:].lower()
            itemsize = result_dtype(job, name).itemsize
            count, rest = divmod(len(message.chunk.data), itemsize)
            assert rest == 0
            assert count > 0
            assert count == 1 or len(message.chunk.data) <= job.max_chunk_bytes
            assert message.chunk.index == received[name]
            outcome.order.append((name, message.chunk.index, count))
            received[name] += count
            parts[name].append(message.chunk.data)
        outcome.receipt = message.receipt
        assert self.receive() is None
        m, n, k = outcome.receipt.m, job.n, job.k
        shapes = {"y": (m, k), "dx": (m, n), "dw": (n, k), "db": (1, k)}
        for name, data in parts.items():
            elements = np.frombuffer(b"".join(data), result_dtype(job, name))
            outcome.arrays[name] = elements.reshape(shapes[name])
        return outcome

    def failure(self) -> CallError:
        """Reads to the end of the call, which has to be an error."""
        try:
            while self.receive() is not None:
                pass
        except CallError as failure:
            return failure
        raise AssertionError("the call ended well")


def is_sent(job: job_pb2.Job, name: str) -> bool:
    """Whether a job has a matrix that does not stay in its session."""
    return job.HasField(name) and not getattr(job, name).HasField("kept")


def result_dtype(job: job_pb2.Job, name: str) -> np.dtype[Any]:
    return DTYPES[matrix_pb2.Dtype.Name(getattr(job, name).dtype)[6:].lower()]


def stream_job(
    channel: grpc.Channel,
    problem: Problem,
    *,
    turn_rows: int | None = None,
    message_bytes: int = 1 << 20,
    timeout_s: float = TIMEOUT_S,
    **options: Any,
) -> Outcome:
    """Runs a problem through ComputeStream.

    Args:
        turn_rows: Rows of X and of dY that are sent in turn; B if None.
        message_bytes: Payload of a Chunk.
        options: See `Problem.job`.
    """
    with Stream(channel, timeout_s=timeout_s) as stream:
        stream.send(problem.job(**options))
        outcome = stream.receive_accepted()
        turn_rows = turn_rows or outcome.accepted.block_rows
        stream.send_all(problem.body(turn_rows, message_bytes))
        stream.half_close()
        return stream.receive_results(outcome)


def compute_job(channel: grpc.Channel, problem: Problem, **options: Any) -> Outcome:
    """Runs a problem through Compute."""
    return compute_request(channel, problem.compute_request(**options))


def compute_request(
    channel: grpc.Channel,
    request: service_pb2.ComputeRequest | bytes,
    timeout_s: float = TIMEOUT_S,
) -> Outcome:
    """Calls Compute with a message or its bytes."""
    if not isinstance(request, bytes):
        request = request.SerializeToString()
    try:
        answer = channel.unary_unary(f"/{SERVICE}/Compute")(request, timeout=timeout_s)
    except grpc.RpcError as error:
        raise CallError(error) from None
    response = service_pb2.ComputeResponse.FromString(answer)
    job = response.accepted.effective_job
    shapes = {"y": (job.m, job.k), "dx": (job.m, job.n), "dw": (job.n, job.k)}
    shapes["db"] = (1, job.k)
    arrays = {
        name: np.frombuffer(getattr(response, name), result_dtype(job, name)).reshape(
            shape
        )
        for name, shape in shapes.items()
        if job.HasField(name)
    }
    return Outcome(response.accepted, arrays=arrays, receipt=response.receipt)


def assert_exact(outcome: Outcome, problem: Problem, **dtypes: str) -> None:
    """Every wanted result has every element right, and nothing else came."""
    expected = problem.expected(**dtypes)
    job = outcome.accepted.effective_job
    assert set(outcome.arrays) == {name for name in expected if is_sent(job, name)}
    for name in outcome.arrays:
        array = expected[name]
        actual = outcome.arrays[name]
        assert actual.dtype == array.dtype
        # NumPy knows NaN in its own dtypes only, which bfloat16 is not.
        np.testing.assert_array_equal(
            actual.astype(np.float64), array.astype(np.float64), strict=True
        )
