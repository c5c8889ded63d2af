"""What a client makes of a server that answers anything at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import gradwire
from gradwire._core.exchange import JobExchange
from gradwire_protocol import framing
from gradwire_protocol.matrices import DEFAULT_RESULTS, Matrix
from tests.client.core.fake_server import FakeServer, converse
from tests.client.core.test_exchange import array_job
from tests.support import oracle
from tests.thorough.fuzz.containers import Container
from tests.thorough.fuzz.parsers import Check

M, N, K = 6, 3, 2
JOB_ID = "fuzzed"
OPERANDS = oracle.operands(M, N, K, "float64")


def conversation(*, checkpoint: bool = False) -> list[bytes]:
    """The answers of a good server."""
    job = array_job(*OPERANDS, request_id=JOB_ID, checkpoint_rows=4)
    exchange = job.exchange()
    first = FakeServer().open(exchange.opening())
    if checkpoint:
        first.append(framing.encode_checkpoint(4))
        first.append(framing.encode_chunk(int(Matrix.DW_SUM), 0, bytes(N * K * 8)))
    return [*first, *converse(exchange, job.messages(exchange), FakeServer())]


@contextlib.contextmanager
def any_answers() -> Iterator[Check]:
    """A client has results, or an error of the SDK's own, and no other end."""

    def check(data: bytes) -> None:
        job = array_job(*OPERANDS, request_id=JOB_ID, checkpoint_rows=4)
        exchange: JobExchange = job.exchange()
        exchange.opening()
        messages = job.messages(exchange)
        try:
            for answer in Container.unpacked(data).messages:
                exchange.receive(answer)
                while next(messages, b""):  # up to its next wait
                    pass
            receipt = exchange.finish()
        except gradwire.GradwireError as refused:
            assert str(refused)  # noqa: PT017
            return
        results = job.outputs.results(DEFAULT_RESULTS)
        assert [each.shape for each in results] == [(M, K), (M, N), (N, K)]
        assert receipt.m == M

    yield check
