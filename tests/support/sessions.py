"""Sessions as any language would use them: generated classes and gRPC, no SDK."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import grpc
import numpy as np
import pytest

from gradwire.v1 import gradient_service_pb2, job_pb2, matrix_pb2
from gradwire.v1 import session_service_pb2 as pb2
from tests.support.raw import (
    DTYPES,
    SERVICE,
    TIMEOUT_S,
    CallError,
    Outcome,
    Problem,
    Stream,
    dtype_number,
    end,
    result_dtype,
)
from tests.support.shared_memory import RawRegion

SESSION_SERVICE = "gradwire.v1.SessionService"
WEIGHT = pb2.TENSOR_ROLE_WEIGHT
GRADIENT = pb2.TENSOR_ROLE_GRADIENT
MIB = 1 << 20


def refusal(call: Callable[[], Any]) -> CallError:
    """The error with which a call fails."""
    with pytest.raises(CallError) as raised:
        call()
    return raised.value


def kept(tensor: int, *, last_use: bool = False) -> job_pb2.Operand:
    """An operand that is a tensor of the session."""
    return job_pb2.Operand(kept=job_pb2.KeptSource(tensor=tensor, last_use=last_use))


def sent_and_kept(tensor: int) -> job_pb2.Operand:
    """An operand in messages that the session keeps."""
    return job_pb2.Operand(
        inline=job_pb2.InlineSource(), keep=job_pb2.KeepAs(tensor=tensor)
    )


def into(
    tensor: int,
    part: int | None = None,
    *,
    parts: int = 0,
    step: int = 0,
    dtype: str = "UNSPECIFIED",
) -> job_pb2.Result:
    """A result that stays in a gradient; without a part, in its place."""
    add = None
    if part is not None:
        add = job_pb2.Contribution(step=step, part=part, parts=parts)
    destination = job_pb2.KeptDestination(tensor=tensor, add=add)
    return job_pb2.Result(dtype=dtype_number(dtype), kept=destination)


def header(array: np.ndarray, **fields: Any) -> pb2.TensorHeader:
    """The header of a tensor with an array's shape and dtype."""
    given = {
        "shape": array.shape,
        "dtype": dtype_number(array.dtype.name),
        "role": WEIGHT,
    }
    return pb2.TensorHeader(**(given | fields))


def chunks(array: np.ndarray, chunk_bytes: int = MIB) -> Iterator[pb2.PutTensorRequest]:
    """The messages with an array's elements."""
    elements = array.reshape(-1)
    size = max(1, chunk_bytes // array.itemsize)
    for first in range(0, array.size, size):
        part = elements[first : first + size].tobytes()
        yield pb2.PutTensorRequest(chunk=pb2.TensorChunk(index=first, data=part))


def sgd(*pairs: tuple[int, int], lr: float = 1.0, **options: Any) -> pb2.ParameterGroup:
    """Weights, each with its gradient, updated by SGD."""
    parameters = [pb2.Parameter(weight=w, gradient=g) for w, g in pairs]
    return pb2.ParameterGroup(parameters=parameters, sgd=pb2.Sgd(lr=lr, **options))


class RawSessions:
    """The methods of SessionService on a channel.

    Args:
        channel: A channel, with whatever options.
        token: The session that calls name; empty: none.
    """

    def __init__(
        self, channel: grpc.Channel, token: str = "", timeout_s: float = TIMEOUT_S
    ) -> None:
        self.channel = channel
        self.token = token
        self.timeout_s = timeout_s

    def over(self, channel: grpc.Channel) -> RawSessions:
        """The same session over another channel."""
        return RawSessions(channel, self.token, self.timeout_s)

    def call(self, name: str, request: Any, *, timeout_s: float | None = None) -> Any:
        """Call a method with one message each way; bytes are sent as they are."""
        data = request if isinstance(request, bytes) else request.SerializeToString()
        method = self.channel.unary_unary(f"/{SESSION_SERVICE}/{name}")
        try:
            answer = method(data, timeout=timeout_s or self.timeout_s)
        except grpc.RpcError as error:
            raise CallError(error) from None
        return getattr(pb2, f"{name}Response").FromString(answer)

    def open(self, keep_bytes: int = MIB, **fields: Any) -> RawSessions:
        """Open a session; return the methods with its name."""
        answer = self.call(
            "OpenSession", pb2.OpenSessionRequest(keep_bytes=keep_bytes, **fields)
        )
        return RawSessions(self.channel, answer.session, self.timeout_s)

    def renew(self) -> Any:
        return self.call("RenewSession", pb2.RenewSessionRequest(session=self.token))

    def close(self) -> None:
        self.call("CloseSession", pb2.CloseSessionRequest(session=self.token))

    def describe(self) -> Any:
        return self.call(
            "DescribeSession", pb2.DescribeSessionRequest(session=self.token)
        )

    @property
    def used_bytes(self) -> int:
        used: int = self.describe().used_bytes
        return used

    def tensors(self) -> dict[int, Any]:
        """The tensors' descriptions by number."""
        return {each.header.tensor: each for each in self.describe().tensors}

    def drop(self, *tensors: int) -> int:
        request = pb2.DropTensorsRequest(session=self.token, tensors=tensors)
        used: int = self.call("DropTensors", request).used_bytes
        return used

    def step(self, step: int, *groups: pb2.ParameterGroup, **fields: Any) -> Any:
        request = pb2.StepRequest(
            session=self.token, step=step, groups=groups, **fields
        )
        return self.call("Step", request)

    def put_messages(
        self, messages: Iterable[Any], *, timeout_s: float | None = None
    ) -> Any:
        """Call PutTensor with messages, or their bytes."""
        method = self.channel.stream_unary(f"/{SESSION_SERVICE}/PutTensor")
        encoded = (
            each if isinstance(each, bytes) else each.SerializeToString()
            for each in messages
        )
        try:
            answer = method(encoded, timeout=timeout_s or self.timeout_s)
        except grpc.RpcError as error:
            raise CallError(error) from None
        return pb2.PutTensorResponse.FromString(answer)

    def put(self, tensor: int, array: np.ndarray, **fields: Any) -> int:
        """Put an array; return the bytes that tensors use."""
        first = header(array, session=self.token, tensor=tensor, **fields)
        messages = [pb2.PutTensorRequest(header=first), *chunks(array)]
        used: int = self.put_messages(messages).used_bytes
        return used

    def zeros(self, tensor: int, shape: Sequence[int], **fields: Any) -> int:
        """Put a gradient without contributions."""
        fields = {"role": GRADIENT, "dtype": dtype_number("float32")} | fields
        first = pb2.TensorHeader(
            session=self.token, tensor=tensor, shape=shape, zeros=True, **fields
        )
        used: int = self.put_messages([pb2.PutTensorRequest(header=first)]).used_bytes
        return used

    def get_messages(self, tensor: int, **fields: Any) -> list[Any]:
        """Every message of a tensor."""
        request = pb2.GetTensorRequest(session=self.token, tensor=tensor, **fields)
        method = self.channel.unary_stream(f"/{SESSION_SERVICE}/GetTensor")
        try:
            answers = list(method(request.SerializeToString(), timeout=self.timeout_s))
        except grpc.RpcError as error:
            raise CallError(error) from None
        return [pb2.GetTensorResponse.FromString(each) for each in answers]

    def get(self, tensor: int, **fields: Any) -> np.ndarray:
        """A tensor's elements."""
        first, *rest = self.get_messages(tensor, **fields)
        at, data = 0, []
        dtype = list(DTYPES.values())[first.header.dtype - 1]
        for message in rest:
            assert message.chunk.index == at
            data.append(message.chunk.data)
            at += len(message.chunk.data) // dtype.itemsize
        return np.frombuffer(b"".join(data), dtype).reshape(tuple(first.header.shape))

    def ref(self, step: int | None = None) -> job_pb2.SessionRef:
        """The session in a job's header."""
        return job_pb2.SessionRef(session=self.token, step=step)

    def compute(self, problem: Problem, **fields: Any) -> Outcome:
        """Run a job with kept matrices through Compute."""
        job = problem.job(session=self.ref(), **fields)
        operands = {
            name: getattr(problem, name).tobytes()
            for name in problem.operands
            if not getattr(job, name).HasField("kept")
        }
        request = gradient_service_pb2.ComputeRequest(job=job, **operands)
        try:
            answer = self.channel.unary_unary(f"/{SERVICE}/Compute")(
                request.SerializeToString(), timeout=self.timeout_s
            )
        except grpc.RpcError as error:
            raise CallError(error) from None
        response = gradient_service_pb2.ComputeResponse.FromString(answer)
        outcome = Outcome(response.accepted, receipt=response.receipt)
        wanted = response.accepted.effective_job
        for name, shape in shapes(problem).items():
            if wanted.HasField(name) and not getattr(wanted, name).HasField("kept"):
                elements = np.frombuffer(
                    getattr(response, name), result_dtype(wanted, name)
                )
                outcome.arrays[name] = elements.reshape(shape)
        return outcome

    def stream(
        self, problem: Problem, *, message_bytes: int = MIB, **fields: Any
    ) -> Outcome:
        """Run a job with kept matrices through ComputeStream."""
        job = problem.job(session=self.ref(), **fields)
        with Stream(self.channel, timeout_s=self.timeout_s) as stream:
            stream.send(job)
            outcome = stream.receive_accepted()
            rows = outcome.accepted.block_rows
            stream.send_all(body(problem, job, rows, message_bytes))
            stream.half_close()
            return receive(stream, outcome, problem)


def shapes(problem: Problem) -> dict[str, tuple[int, int]]:
    """Shapes of all results."""
    m, n, k = problem.shape
    return {"y": (m, k), "dx": (m, n), "dw": (n, k), "db": (1, k)}


def body(
    problem: Problem, job: job_pb2.Job, rows: int, message_bytes: int = MIB
) -> Iterator[Any]:
    """W, the rows of X and dY in turn, and End, without kept operands."""
    sent = [
        name for name in problem.operands if not getattr(job, name).HasField("kept")
    ]
    if "w" in sent:
        yield from problem.chunks("w", 0, problem.w.shape[0], message_bytes)
    m = problem.shape[0]
    for first in range(0, m, rows):
        for name in sent:
            if name != "w":
                last = min(m, first + rows)
                yield from problem.chunks(name, first, last, message_bytes)
    yield end(m)


def receive(stream: Stream, outcome: Outcome, problem: Problem) -> Outcome:
    """The results that are sent, put together."""
    job = outcome.accepted.effective_job
    parts: dict[str, list[bytes]] = {
        name: []
        for name in shapes(problem)
        if job.HasField(name) and not getattr(job, name).HasField("kept")
    }
    while True:
        message = stream.receive()
        assert message is not None
        if message.WhichOneof("message") == "receipt":
            break
        name = matrix_pb2.Matrix.Name(message.chunk.matrix)[7:].lower()
        parts[name].append(message.chunk.data)
    outcome.receipt = message.receipt
    assert stream.receive() is None
    for name, data in parts.items():
        elements = np.frombuffer(b"".join(data), result_dtype(job, name))
        outcome.arrays[name] = elements.reshape(shapes(problem)[name])
    return outcome


def shared(
    session: RawSessions, region: RawRegion, problem: Problem, **fields: Any
) -> Outcome:
    """Run a job whose other matrices are in shared memory.

    Args:
        fields: Kept operands and results, and operands that are kept by `KeepAs`.
    """
    keep = {
        name: message.keep
        for name, message in fields.items()
        if isinstance(message, job_pb2.Operand) and message.HasField("keep")
    }
    others = {name: each for name, each in fields.items() if name not in keep}
    job = region.lay_out(problem, session=session.ref(), **others)
    for name, message in others.items():
        is_matrix = isinstance(message, job_pb2.Operand | job_pb2.Result)
        if is_matrix and message.HasField("kept"):
            getattr(job, name).CopyFrom(message)
    for name, each in keep.items():
        getattr(job, name).keep.CopyFrom(each)
    names = [*problem.operands, *(name for name in shapes(problem) if name != "db")]
    if not any(
        job.HasField(name) and getattr(job, name).HasField("shared") for name in names
    ):
        job.ClearField("regions")
    with Stream(session.channel, timeout_s=session.timeout_s) as stream:
        stream.send(job)
        outcome = stream.receive_accepted()
        stream.send(end(problem.shape[0]))
        stream.half_close()
        message = stream.receive()
        assert message is not None
        outcome.receipt = message.receipt
        assert stream.receive() is None
    for name, bits in region.bits(job).items():
        if not getattr(job, name).HasField("kept"):
            dtype = result_dtype(outcome.accepted.effective_job, name)
            shape = shapes(problem)[name]
            outcome.arrays[name] = np.frombuffer(bits, dtype).reshape(shape)
    return outcome
