"""``gradwire serve``, for the bench: ``python -m bench.server KIND [FLAGS]``.

The flags are those of ``gradwire serve``. Asked on its standard input, the process says
what it has used so far (`report_usage`). The kinds:

- ``numpy``: the NumPy backend, as `gradwire serve` has it.
- ``idle``: it computes nothing. Results are whatever was in memory, and steps change
  no weight. Everything else happens: messages, row blocks, admission, the adding of
  dW to gradients. It stands for a device that is much faster than the link.
- ``idle-products``: its products compute nothing, its steps do.
- ``sleeping``: like ``idle``, and each row block takes `SLEEP_VARIABLE` seconds, in
  which its device uses no processor. So several servers fit on one host.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import numpy as np

from bench.contenders.server_process import report_usage
from gradwire_cli import app
from gradwire_protocol.job_spec import JobSpec
from gradwire_protocol.matrices import Matrix
from gradwire_server.backends import registry
from gradwire_server.backends.base import Array, RowBlock, Sums
from gradwire_server.backends.numpy import updates
from gradwire_server.backends.numpy.backend import NumpyBackend
from gradwire_server.backends.numpy.kept_memory import HostArray

KINDS = ("numpy", "idle", "idle-products", "sleeping")
SLEEP_VARIABLE = "BENCH_SLEEP_S"
"""Environment variable: seconds for each row block of a server that sleeps."""


class IdleBackend(NumpyBackend):
    """A device whose products take no time, because it computes none."""

    def open_job(self, spec: JobSpec, *_: Any, **__: Any) -> IdleJob:  # type: ignore[override]
        """Open a job that leaves its results unset."""
        return IdleJob(spec)


class IdleJob:
    """A job whose results are unset."""

    def __init__(self, spec: JobSpec) -> None:
        self._sums = {
            result: np.empty(result.shape(0, spec.n, spec.k), dtype.numpy)
            for result, dtype in spec.results.items()
            if result in spec.sums
        }
        self._into = spec.into

    def take_w(self, w: Array) -> None:
        """Take W."""

    def take_sums(self, sums: Sums) -> None:
        """Take the sums of an earlier attempt."""

    def compute_block(self, block: RowBlock) -> None:
        """Leave y and dx as they are, but let them be memory.

        Pages that were never written are all the same page of zeros, which the
        processor's cache holds: to send it would cost less than to send results.
        """
        for result in (block.y, block.dx):
            if result is not None and not result.flat[0]:
                result.fill(1)

    def copy_sums(self, out: Sums) -> None:
        """Leave the sums as they are."""

    def restart_sums(self) -> None:
        """Leave the sums as they are."""

    def kept_sums(self) -> dict[Matrix, HostArray]:
        """Return the unset sums that stay."""
        return {result: HostArray(self._sums[result]) for result in self._into}

    def finish(self) -> Sums:
        """Return the other unset sums."""
        return {
            result: array
            for result, array in self._sums.items()
            if result not in self._into
        }

    def close(self) -> None:
        """Do nothing."""


class SleepingBackend(IdleBackend):
    """A device that takes its time, and computes nothing."""

    def open_job(self, spec: JobSpec, *_: Any, **__: Any) -> SleepingJob:  # type: ignore[override]
        """Open a job that leaves its results unset."""
        return SleepingJob(spec, float(os.environ[SLEEP_VARIABLE]))


class SleepingJob(IdleJob):
    """A job each of whose row blocks takes so many seconds."""

    def __init__(self, spec: JobSpec, block_s: float) -> None:
        super().__init__(spec)
        self._block_s = block_s
        for each in self._sums.values():
            each.fill(1)  # memory of its own, as in `compute_block`

    def compute_block(self, block: RowBlock) -> None:
        """Take so many seconds, those in which memory is written included."""
        ends = time.perf_counter() + self._block_s
        super().compute_block(block)
        time.sleep(max(ends - time.perf_counter(), 0.0))


def main(arguments: Sequence[str]) -> int:
    """Serve until SIGTERM."""
    kind, *flags = arguments
    if kind not in KINDS:
        raise ValueError(f"{kind} is none of {', '.join(KINDS)}")
    report_usage()
    with ExitStack() as stack:
        if kind != "numpy":
            backend = SleepingBackend if kind == "sleeping" else IdleBackend
            make = mock.Mock(side_effect=lambda _: backend())
            load = mock.patch.object(registry, "load", return_value=make)
            stack.enter_context(load)
        if kind in {"idle", "sleeping"}:
            for name, result in (("update", None), ("sum_of_squares", 0.0)):
                nothing = mock.Mock(return_value=result)
                stack.enter_context(mock.patch.object(updates, name, nothing))
        return app.run(["serve", *flags])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
