"""``gradwire serve``, for the bench: ``python -m bench.server KIND[:MS[xN]] [FLAGS]``.

The flags are those of ``gradwire serve``. Asked on its standard input, the process says
what it has used so far (`report_usage`). The kinds:

- ``numpy``: the NumPy backend, as `gradwire serve` has it.
- ``idle``: it computes nothing. Results are whatever was in memory, and steps change
  no weight. Everything else happens: messages, row blocks, admission, the adding of
  dW to gradients. It stands for a device that is much faster than the link.
- ``idle-products``: its products compute nothing, its steps do.

With MS, a row block keeps its device busy for so many milliseconds, in which it uses no
processor: ``idle:80``. With N, the server has so many of these devices: ``idle:80x3``.
So several servers and devices fit on one host.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Self
from unittest import mock

import numpy as np

from bench.contenders.server_process import report_usage
from gradwire_cli import app
from gradwire_protocol.job_spec import JobSpec
from gradwire_protocol.matrices import Matrix
from gradwire_server.backends import registry
from gradwire_server.backends.base import Array, RowBlock, Sums, Times, Wait
from gradwire_server.backends.numpy import updates
from gradwire_server.backends.numpy.backend import NumpyBackend
from gradwire_server.backends.numpy.kept_memory import HostArray

KINDS = ("numpy", "idle", "idle-products")


class IdleBackend(NumpyBackend):
    """A device whose products take no time, because it computes none."""

    def open_job(self, spec: JobSpec, *_: Any, **__: Any) -> IdleJob:  # type: ignore[override]
        """Open a job that leaves its results unset."""
        return IdleJob(spec)


class IdleJob:
    """A job whose results are unset."""

    def __init__(self, spec: JobSpec) -> None:
        self._sums = {
            result: np.ones(result.shape(0, spec.n, spec.k), dtype.numpy)
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


class SlowBackend:
    """A backend whose devices take some time for each row block.

    They sleep, so that any number of them fits one machine.

    Args:
        backend: A backend with one device, which computes the row blocks.
        block_s: Seconds of a row block, those of `backend` included.
        devices: Number of devices.
    """

    inline_below_ops = 0

    def __init__(self, backend: NumpyBackend, block_s: float, devices: int) -> None:
        self._backend = backend
        self._block_s = block_s
        (only,) = backend.devices
        self.devices = tuple(replace(only, index=each) for each in range(devices))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def open_job(
        self, spec: JobSpec, block_rows: int, device: int, **options: Any
    ) -> SlowJob:
        """Open a job of the backend."""
        del device
        job = self._backend.open_job(spec, block_rows, 0, **options)
        return SlowJob(job, self._block_s, options["times"])


class SlowJob:
    """A job that takes some time for each row block."""

    def __init__(self, job: Any, block_s: float, times: Times) -> None:
        self._job = job
        self._block_s = block_s
        self._times = times

    def __getattr__(self, name: str) -> Any:
        return getattr(self._job, name)

    def compute_block(self, block: RowBlock) -> Wait | None:
        """Compute the block, and sleep for the rest of its time."""
        ends = time.perf_counter() + self._block_s
        wait: Wait | None = self._job.compute_block(block)
        with self._times.computing():
            time.sleep(max(ends - time.perf_counter(), 0.0))
        return wait


@dataclass(frozen=True, slots=True)
class Devices:
    """What the devices of a server are, from KIND[:MS[xN]]."""

    kind: str
    block_s: float | None = None
    """Seconds of a row block; None: as long as its products take."""
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse the text.

        Raises:
            ValueError: It has another form.
        """
        kind, slow, text = text.partition(":")
        if kind not in KINDS:
            raise ValueError(f"{kind} is none of {', '.join(KINDS)}")
        if not slow:
            return cls(kind)
        ms, _, count = text.partition("x")
        return cls(kind, float(ms) / 1e3, int(count or 1))

    def backend(self) -> NumpyBackend | SlowBackend:
        """Create the backend. Slow devices compute with one thread."""
        own = NumpyBackend(threads=1) if self.kind == "numpy" else IdleBackend()
        if self.block_s is None:
            return own
        return SlowBackend(own, self.block_s, self.count)


def main(arguments: Sequence[str]) -> int:
    """Serve until SIGTERM."""
    text, *flags = arguments
    devices = Devices.parse(text)
    report_usage()
    with ExitStack() as stack:
        if devices != Devices("numpy"):
            make = mock.Mock(side_effect=lambda _: devices.backend())
            load = mock.patch.object(registry, "load", return_value=make)
            stack.enter_context(load)
        if devices.kind == "idle":
            for name, result in (("update", None), ("sum_of_squares", 0.0)):
                nothing = mock.Mock(return_value=result)
                stack.enter_context(mock.patch.object(updates, name, nothing))
        return app.run(["serve", *flags])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
