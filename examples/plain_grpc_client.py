"""The contract without the SDK: plain grpcio and the generated stub.

.venv/bin/python examples/plain_grpc_client.py [ADDRESS]

Every language with gRPC can do the same. The stub is generated from protos/ alone;
``gradwire.v1`` is the ready-made Python stub. docs/contract.md explains the order
of the messages.
"""

from __future__ import annotations

from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any, TypeAlias

import grpc
import numpy as np
import numpy.typing as npt
from local_server import given_or_local_server

from gradwire.v1.gradient_service_pb2 import ComputeRequest, ComputeStreamRequest
from gradwire.v1.gradient_service_pb2_grpc import GradientServiceStub
from gradwire.v1.job_pb2 import (
    Accepted,
    End,
    InlineDestination,
    InlineSource,
    Job,
    Operand,
    Result,
)
from gradwire.v1.matrix_pb2 import (
    DTYPE_FLOAT32,
    MATRIX_DW,
    MATRIX_DX,
    MATRIX_DY,
    MATRIX_W,
    MATRIX_X,
    MATRIX_Y,
    Chunk,
)

Array: TypeAlias = npt.NDArray[Any]
Results: TypeAlias = tuple[Array, Array, Array]

PAYLOAD_BYTES = 1 << 20


def header(m: int, n: int, k: int) -> Job:
    """A float32 job with all three results, inline."""
    sent, returned = Operand(inline=InlineSource()), Result(inline=InlineDestination())
    job = Job(m=m, n=n, k=k, dtype=DTYPE_FLOAT32)
    job.x.CopyFrom(sent)
    job.w.CopyFrom(sent)
    job.dy.CopyFrom(sent)
    job.y.CopyFrom(returned)
    job.dx.CopyFrom(returned)
    job.dw.CopyFrom(returned)
    return job


def compute(stub: GradientServiceStub, x: Array, w: Array, dy: Array) -> Results:
    """Compute with one message each way, of at most 4 MiB: for small matrices."""
    (m, n), k = x.shape, w.shape[1]
    reply = stub.Compute(
        ComputeRequest(
            job=header(m, n, k), x=x.tobytes(), w=w.tobytes(), dy=dy.tobytes()
        )
    )
    return (
        np.frombuffer(reply.y, np.float32).reshape(m, k),
        np.frombuffer(reply.dx, np.float32).reshape(m, n),
        np.frombuffer(reply.dw, np.float32).reshape(n, k),
    )


def compute_stream(stub: GradientServiceStub, x: Array, w: Array, dy: Array) -> Results:
    """Compute a job of any size, in messages of 1 MiB."""
    (m, n), k = x.shape, w.shape[1]
    results = {
        MATRIX_Y: np.empty((m, k), np.float32),
        MATRIX_DX: np.empty((m, n), np.float32),
        MATRIX_DW: np.empty((n, k), np.float32),
    }
    # gRPC iterates over the requests in another thread, so this thread reads while
    # the other writes, as the contract requires.
    accepted: SimpleQueue[Accepted | None] = SimpleQueue()
    try:
        for response in stub.ComputeStream(requests(x, w, dy, accepted)):
            match response.WhichOneof("message"):
                case "accepted":
                    accepted.put(response.accepted)
                case "chunk":
                    chunk = response.chunk
                    elements = np.frombuffer(chunk.data, np.float32)
                    flat = results[chunk.matrix].reshape(-1)
                    flat[chunk.index : chunk.index + elements.size] = elements
                case "receipt":
                    print(f"  {response.receipt.blocks} row blocks computed")
    finally:
        accepted.put(None)  # a refused job is never accepted: stop waiting
    return results[MATRIX_Y], results[MATRIX_DX], results[MATRIX_DW]


def requests(
    x: Array, w: Array, dy: Array, accepted: SimpleQueue[Accepted | None]
) -> Iterator[ComputeStreamRequest]:
    """Job; once accepted, W; the rows of X and dY, block by block; End."""
    m = len(x)
    yield ComputeStreamRequest(job=header(m, x.shape[1], w.shape[1]))
    answer = accepted.get()
    if answer is None:
        return
    yield from chunks(MATRIX_W, w, 0, len(w))
    for first in range(0, m, answer.block_rows):
        last = min(first + answer.block_rows, m)
        yield from chunks(MATRIX_X, x, first, last)
        yield from chunks(MATRIX_DY, dy, first, last)
    yield ComputeStreamRequest(end=End(m=m))


def chunks(
    matrix: int, elements: Array, first: int, last: int
) -> Iterator[ComputeStreamRequest]:
    """Rows first to last - 1, in messages of at most 1 MiB."""
    flat, columns = elements.reshape(-1), elements.shape[1]
    step = PAYLOAD_BYTES // elements.itemsize
    for start in range(first * columns, last * columns, step):
        part = flat[start : min(start + step, last * columns)]
        yield ComputeStreamRequest(
            chunk=Chunk(matrix=matrix, index=start, data=part.tobytes())
        )


def main() -> None:
    """Compute one job with both methods, and a larger job as a stream."""
    rng = np.random.default_rng(3)

    def operands(m: int, n: int, k: int) -> Results:
        shapes = (m, n), (n, k), (m, k)
        x, w, dy = (rng.standard_normal(s, np.float32) for s in shapes)
        return x, w, dy

    with given_or_local_server() as address, grpc.insecure_channel(address) as channel:
        stub = GradientServiceStub(channel)
        small = operands(300, 200, 100)
        once, streamed = compute(stub, *small), compute_stream(stub, *small)
        same = all(map(np.array_equal, once, streamed))
        print("The same bits from Compute and ComputeStream:", same)
        x, w, dy = operands(30_000, 500, 300)
        y, dx, dw = compute_stream(stub, x, w, dy)
    for name, result, expected in (
        ("Y", y, x @ w),
        ("dX", dx, dy @ w.T),
        ("dW", dw, x.T @ dy),
    ):
        right = np.allclose(result, expected, rtol=1e-4, atol=2e-3)
        print(f"{name} is correct:", right)


if __name__ == "__main__":
    main()
