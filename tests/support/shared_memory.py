"""Shared memory as any language would use it: a mapping of a file, no SDK."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from gradwire.v1 import gradient_service_pb2 as service_pb2
from gradwire.v1 import job_pb2
from tests.support.raw import DTYPES, SERVICE, CallError, Problem, Stream, end

MATRICES = ("x", "w", "dy", "y", "dx", "dw")


def descriptors(pid: int) -> int:
    """How many descriptors of regions a process has."""
    count = 0
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            count += "gradwire-region" in str(link.readlink())
        except OSError:  # it was closed meanwhile
            continue
    return count


def open_region(channel: grpc.Channel, **fields: object) -> Any:
    """The answers of OpenRegion."""
    return channel.unary_stream(
        f"/{SERVICE}/OpenRegion",
        request_serializer=service_pb2.OpenRegionRequest.SerializeToString,
        response_deserializer=service_pb2.OpenRegionResponse.FromString,
    )(service_pb2.OpenRegionRequest(**fields))


def proof_for(channel: grpc.Channel) -> bytes:
    """The proof that this process is on the server's host.

    Raises:
        CallError: The server does not ask for it.
    """
    try:
        (answer,) = open_region(channel)
    except grpc.RpcError as error:
        raise CallError(error) from None
    challenge = answer.challenge
    contents = Path(f"/proc/{challenge.pid}/fd/{challenge.fd}").read_bytes()
    assert contents[:32] == challenge.cookie
    return contents[32:]


class RawRegion:
    """A region, mapped.

    Raises:
        CallError: The server refuses it.
    """

    def __init__(self, channel: grpc.Channel, size_bytes: int) -> None:
        proof = proof_for(channel)
        self.call = open_region(channel, size_bytes=size_bytes, proof=proof)
        try:
            self.answer: service_pb2.OpenRegionResponse = next(self.call)
        except grpc.RpcError as error:
            raise CallError(error) from None
        self.path = f"/proc/{self.answer.pid}/fd/{self.answer.fd}"
        fd = os.open(self.path, os.O_RDWR)
        self.memory = np.frombuffer(mmap.mmap(fd, self.answer.size_bytes), np.uint8)
        os.close(fd)

    def close(self) -> None:
        self.call.cancel()

    def __enter__(self) -> RawRegion:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def lay_out(self, problem: Problem, **options: object) -> job_pb2.Job:
        """A job whose matrices lie one after the other; the operands are there."""
        job = problem.job(**options)
        job.regions.add(token=self.answer.token)
        at = 0
        for name in MATRICES:
            if job.HasField(name):
                getattr(job, name).shared.offset_bytes = at
                getattr(job, name).shared.SetInParent()
                size = self._size(job, name)
                if name in problem.operands:
                    operand = getattr(problem, name).reshape(-1).view(np.uint8)
                    self.memory[at : at + size] = operand
                at += -(-size // 64) * 64
        return job

    def bits(self, job: job_pb2.Job) -> dict[str, bytes]:
        """The results that lie there."""
        return {
            name: self._matrix(job, name)
            for name in ("y", "dx", "dw")
            if job.HasField(name)
        }

    def _matrix(self, job: job_pb2.Job, name: str) -> bytes:
        at = getattr(job, name).shared.offset_bytes
        return self.memory[at : at + self._size(job, name)].tobytes()

    def _size(self, job: job_pb2.Job, name: str) -> int:
        rows = job.n if name in {"w", "dw"} else job.m
        columns = job.n if name in {"x", "dx"} else job.k
        dtype = job.dtype
        if name in {"y", "dx", "dw"}:
            dtype = getattr(job, name).dtype or dtype
        return rows * columns * list(DTYPES.values())[dtype - 1].itemsize


def shared_job(channel: grpc.Channel, job: job_pb2.Job) -> job_pb2.Receipt:
    """Runs a job that lies in a region; its results are there afterwards."""
    with Stream(channel) as stream:
        stream.send(job)
        stream.receive_accepted()
        stream.send(end(job.m))
        stream.half_close()
        answer = stream.receive()
        assert answer is not None
        assert answer.WhichOneof("message") == "receipt"
        assert stream.receive() is None
        return answer.receipt
