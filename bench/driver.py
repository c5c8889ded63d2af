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

from bench.work import Shape

SETTLE_S = 0.15
"""Before every turn. The threads of a BLAS that is done wait for more work in a
loop for a while, and would take a core from whoever is next."""

ANSWER_TIMEOUT_S = 120.0
# gRPC tells of every connection that a server closes when it stops.
_QUIET = {"GRPC_VERBOSITY": "ERROR"}
_THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class Turn:
    """What one contender did in one round."""

    contender: str
    round: int
    calls_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """What a contender's processes used."""

    contender: str
    calls: int
    """Calls of all turns."""

    client_cpu_s: float
    """Processor time of the client during the turns, products included."""

    server_cpu_s: float
    """That of the server."""

    client_peak_bytes: int
    """Highest resident memory of the client, operands and results included."""

    server_peak_bytes: int | None
    """That of the server, where there is one that the bench has started."""


class Worker:
    """A `bench.worker` process as the driver sees it.

    Args:
        contender: Its name.
        shape: What it computes.
        form: One of `bench.work.FORMS`.
        threads: Threads that compute, in each process.
        before: What runs its command elsewhere: ``ip netns exec NAME``.
    """

    def __init__(
        self,
        contender: str,
        shape: Shape,
        form: str,
        threads: int,
        before: Sequence[str] = (),
    ) -> None:
        self.contender = contender
        command = [sys.executable, "-m", "bench.worker", contender, form, str(shape)]
        self._process = subprocess.Popen(
            [*before, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_QUIET | os.environ | dict.fromkeys(_THREAD_VARIABLES, str(threads)),
        )

    def wait_until_ready(self) -> None:
        """Wait until it has computed once, and right.

        Raises:
            RuntimeError: It ended instead.
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
        """End the process, whatever it is at; it ends its own server."""
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
    """The order of one round: each round another contender begins."""
    first = round_number % len(names)
    return [*names[first:], *names[:first]]


@contextlib.contextmanager
def working(
    names: Sequence[str],
    shape: Shape,
    form: str,
    threads: int,
    before: Sequence[str] = (),
) -> Iterator[list[Worker]]:
    """A worker of each contender, all alive at once, and ready."""
    with contextlib.ExitStack() as stack:
        workers = []
        for name in names:
            workers.append(Worker(name, shape, form, threads, before))
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
    on_turn: Callable[[Turn], None] = lambda _: None,
) -> tuple[list[Turn], list[Usage]]:
    """Rounds of turns until their number or the time is used up.

    Args:
        names: The contenders.
        shape: What they compute.
        form: One of `bench.work.FORMS`.
        threads: Threads that compute, in each process.
        rounds: The most rounds.
        seconds: After so long no further round begins, but for the first
            `least_rounds`.
        least_rounds: Rounds that are taken however long they last.
        before: What runs a client's command elsewhere.
        on_turn: Told of each turn as it ends.

    Raises:
        RuntimeError: A worker ended, or was wrong.
    """
    turns: list[Turn] = []
    with working(names, shape, form, threads, before) as workers:
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
