"""Turns between worker processes, one shape at a time."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bench.work import PRODUCTS_VARIABLE, Shape

SETTLE_S = 0.15
"""Pause before every turn. Idle BLAS threads spin for a while, and would take a core
from the next contender."""

ANSWER_TIMEOUT_S = 120.0
# gRPC logs every connection closed by a stopping server.
_QUIET = {"GRPC_VERBOSITY": "ERROR"}
_THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class Turn:
    """The calls of one contender in one round."""

    contender: str
    round: int
    calls_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """Processor time and memory of a contender's processes."""

    contender: str
    calls: int
    """Number of calls in all turns."""

    client_cpu_s: float
    """Processor time of the client during the turns, products included."""

    server_cpu_s: float
    """Processor time of the server."""

    client_peak_bytes: int
    """Highest resident memory of the client, operands and results included."""

    server_peak_bytes: int | None
    """Highest resident memory of the server, if the bench started one."""

    client_switches: int | None = None
    """Context switches of the client during the turns; None in figures of earlier
    states."""

    server_switches: int | None = None
    """Context switches of the server, if the bench started one."""


class Worker:
    """A `bench.worker` process, seen by the driver.

    Args:
        contender: Name of the contender.
        shape: Shape of the job.
        form: One of `bench.work.FORMS`.
        threads: Compute threads in each process.
        before: Prefix of the worker's command, such as ``ip netns exec NAME``.
        products: Whether servers compute; if not, calls take as long as transports.
    """

    def __init__(
        self,
        contender: str,
        shape: Shape,
        form: str,
        threads: int,
        before: Sequence[str] = (),
        *,
        products: bool = True,
    ) -> None:
        self.contender = contender
        command = [sys.executable, "-m", "bench.worker", contender, form, str(shape)]
        work = {PRODUCTS_VARIABLE: "numpy" if products else "none"}
        self._process = subprocess.Popen(
            [*before, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_QUIET
            | os.environ
            | dict.fromkeys(_THREAD_VARIABLES, str(threads))
            | work,
        )

    def wait_until_ready(self) -> None:
        """Wait until the worker has computed one correct result.

        Raises:
            RuntimeError: The worker ended.
        """
        self._answer()

    def take_turn(self, number: int) -> Turn:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return Turn(self.contender, number, tuple(self._answer()["calls_s"]))

    def finish(self) -> Usage:
        assert self._process.stdin is not None
        self._process.stdin.close()
        answer = self._answer()
        self._process.wait(ANSWER_TIMEOUT_S)
        return Usage(self.contender, **answer)

    def end(self) -> None:
        """End the process at once; the worker ends its own server."""
        if self._process.poll() is None:
            self._process.terminate()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _answer(self) -> dict[str, Any]:
        too_late = threading.Timer(ANSWER_TIMEOUT_S, self._process.kill)
        too_late.start()
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        too_late.cancel()
        if not line:
            status = self._process.wait()
            raise RuntimeError(f"{self.contender} ended with exit status {status}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def rotated(names: Sequence[str], round_number: int) -> list[str]:
    """The contenders' order in a round: each round starts with another one."""
    first = round_number % len(names)
    return [*names[first:], *names[:first]]


@contextlib.contextmanager
def working(
    names: Sequence[str],
    shape: Shape,
    form: str,
    threads: int,
    before: Sequence[str] = (),
    *,
    products: bool = True,
) -> Iterator[list[Worker]]:
    """Start a worker for each contender, and wait until all are ready."""
    with contextlib.ExitStack() as stack:
        workers = []
        for name in names:
            workers.append(
                Worker(name, shape, form, threads, before, products=products)
            )
            stack.callback(workers[-1].end)
            workers[-1].wait_until_ready()
        yield workers


def run_shape(
    names: Sequence[str],
    shape: Shape,
    *,
    form: str,
    threads: int,
    rounds: int,
    seconds: float,
    least_rounds: int = 3,
    before: Sequence[str] = (),
    products: bool = True,
    on_turn: Callable[[Turn], None] = lambda _: None,
) -> tuple[list[Turn], list[Usage]]:
    """Run rounds of turns until a limit on rounds or time is reached.

    Args:
        names: The contenders.
        shape: Shape of the job.
        form: One of `bench.work.FORMS`.
        threads: Compute threads in each process.
        rounds: Maximum number of rounds.
        seconds: Time limit for starting a round after `least_rounds`.
        least_rounds: Rounds that run regardless of the time limit.
        before: Prefix of a client's command.
        products: Whether servers compute.
        on_turn: Called with each turn at its end.

    Raises:
        RuntimeError: A worker ended, or its result was wrong.
    """
    turns: list[Turn] = []
    with working(names, shape, form, threads, before, products=products) as workers:
        by_name = {worker.contender: worker for worker in workers}
        began = time.monotonic()
        for number in range(rounds):
            if number >= least_rounds and time.monotonic() - began > seconds:
                break
            for name in rotated(names, number):
                time.sleep(SETTLE_S)
                turns.append(by_name[name].take_turn(number))
                on_turn(turns[-1])
        return turns, [worker.finish() for worker in workers]
