"""The jobs of a batched W are in flight together, and end together."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import gradwire
from gradwire._api.options import parse_options
from gradwire._client.batch_job import BatchJob
from gradwire_protocol.matrices import OPERANDS, Matrix
from tests.scenarios import ways
from tests.scenarios.callers import CALLERS, Caller
from tests.support.serving import ServerProcess

BATCH = 12


def operands(m: int = 40, n: int = 30, k: int = 20) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    return tuple(
        rng.standard_normal((BATCH, *shape)) for shape in ((m, n), (n, k), (m, k))
    )


@pytest.fixture(params=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture(params=[ways.COMPUTE, ways.STREAM], ids=str)
def waiting(
    request: pytest.FixtureRequest, kind: str, occupied: ServerProcess
) -> Iterator[Caller]:
    """A client of a server where one job runs on, and one more may wait."""
    caller = CALLERS[kind](request.param, occupied)
    caller.client._engine.retries.policy = gradwire.RetryPolicy(attempts=1)
    yield caller
    caller.close()


def test_jobs_are_in_flight_together_and_one_failure_ends_all(waiting: Any) -> None:
    """The first job waits. The second finds no place, and the first is cancelled."""
    x, w, dy = operands()
    with pytest.raises(gradwire.ServerBusyError) as caught:
        waiting.run(waiting.client.gradients(x, w, dy))
    assert any("of a batch of 12 jobs" in note for note in caught.value.__notes__)


def test_the_timeout_is_for_all_jobs(client: gradwire.Client) -> None:
    given = dict(zip(OPERANDS, operands(), strict=True))
    options = parse_options(timeout_s=10)
    batch = client._engine.jobs.array_job(given, None, (), options)
    left = []
    while isinstance(batch, BatchJob) and (part := batch.begin()) is not None:
        left.append(part.job.plan.options.timeout_s)
    assert len(left) == BATCH
    assert left == sorted(left, reverse=True)
    assert 10 > left[0] > left[-1] > 0


def test_progress_is_of_all_jobs(streamer: Any) -> None:
    x, w, dy = operands()
    seen: list[gradwire.Progress] = []
    result = streamer.gradients(x, w, dy, on_progress=seen.append)
    sent = sum(array.nbytes for array in (x, w, dy))
    received = sum(array.nbytes for array in result)
    assert {each.bytes_to_send for each in seen} == {sent}
    assert {each.bytes_to_receive for each in seen} == {received}
    assert {each.m for each in seen} == {BATCH * 40}
    sizes = [(each.bytes_sent, each.bytes_received, each.rows_sent) for each in seen]
    assert sizes == sorted(sizes)
    assert sizes[-1] == (sent, received, BATCH * 40)


def test_an_exception_of_on_progress_ends_the_call(caller: Any) -> None:
    x, w, dy = operands()

    def on_progress(progress: gradwire.Progress) -> None:
        if progress.bytes_sent > x[:2].nbytes:
            raise EOFError

    with pytest.raises(EOFError):
        caller.gradients(x, w, dy, on_progress=on_progress)
    expected = np.matmul(x, w)
    np.testing.assert_allclose(caller.forward(x, w), expected, atol=1e-12)


@pytest.mark.parametrize("way", [ways.COMPUTE, ways.STREAM], ids=str)
def test_ctrl_c_ends_all_jobs(occupied: ServerProcess, way: ways.Way) -> None:
    """Nothing writes to `out` afterwards, though the server would go on."""
    x, w, _ = operands()
    y = np.zeros((BATCH, 40, 20))
    main = threading.main_thread().ident
    assert main is not None
    before = set(threading.enumerate())
    with way.connect(occupied, timeout_s=None) as client:
        timer = threading.Timer(0.5, signal.pthread_kill, (main, signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            client.forward(x, w, out=y)
        timer.join()
        names = [thread.name for thread in set(threading.enumerate()) - before]
        assert not [name for name in names if name.startswith("gradwire")]
    assert not y.any()


@pytest.mark.parametrize(("n", "jobs"), [(30, 8), (10_000, 2)])
def test_many_small_jobs_or_few_large_ones_run_at_once(
    client: gradwire.Client, n: int, jobs: int
) -> None:
    x = np.broadcast_to(np.float64(1), (BATCH, n, n))
    given = {Matrix.X: x, Matrix.W: x}
    options = parse_options(results="y")
    batch = client._engine.jobs.array_job(given, None, (), options)
    assert isinstance(batch, BatchJob)
    assert batch.in_flight == jobs
