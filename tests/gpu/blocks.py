"""Jobs of a backend, one row block at a time, as a device worker has them computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from gradwire_protocol.job_spec import JobSpec
from gradwire_protocol.matrices import Matrix
from gradwire_server.backends.base import RowBlock, Times

Begun: TypeAlias = Callable[[], None]
"""Waits for a row block, and takes its results away."""


class Run:
    """A job.

    W and the blocks lie in host memory of the backend's, or of `empty`. A slot
    is overwritten as soon as the wait for its block is over, as in a server.

    Args:
        backend: A backend whose device worker is this thread.
        spec: What is wanted.
        given: x, w and dy, whole.
        block_rows: Rows of a block.
        empty: Takes a size in bytes and gives that much memory.
        begun: How many blocks may have begun; as many as the backend likes.
        in_flight: What has begun on the device worker, for jobs that share it.
    """

    def __init__(
        self,
        backend: Any,
        spec: JobSpec,
        given: Sequence[Any],
        block_rows: int,
        *,
        empty: Callable[[int], Any] | None = None,
        begun: int | None = None,
        in_flight: deque[Begun] | None = None,
    ) -> None:
        self._x, w, self._dy = given
        self._spec, self._rows = spec, block_rows
        self._empty = empty or backend.empty
        self._most = begun or backend.pipeline_depth
        self._in_flight: deque[Begun] = deque() if in_flight is None else in_flight
        self._next = 0
        self._slots = [self._slot() for _ in range(self._most)]
        self.times = Times()
        self.results = {
            matrix: np.empty((len(self._x), spec.row_length(matrix)), dtype.numpy)
            for matrix, dtype in spec.results.items()
            if matrix.row_wise
        }
        self._job = backend.open_job(spec, block_rows, 0, times=self.times)
        self._w = self._matrix(w.shape, w.dtype)
        self._w[...] = w
        self._job.take_w(self._w)

    def step(self) -> bool:
        """Begins the next block; whether there was one."""
        first = self._next * self._rows
        if first >= len(self._x):
            return False
        while len(self._in_flight) >= self._most:
            self._in_flight.popleft()()
        slot = self._slots[self._next % self._most]
        part = slice(first, min(first + self._rows, len(self._x)))
        count = part.stop - part.start
        views = {matrix: array[:count] for matrix, array in slot.items()}
        views[Matrix.X][...] = self._x[part]
        views[Matrix.DY][...] = self._dy[part]
        wanted = {m: views[m] for m in (Matrix.Y, Matrix.DX) if m in self.results}
        wait = self._job.compute_block(
            RowBlock(
                rows=count,
                x=views[Matrix.X],
                dy=views[Matrix.DY],
                y=wanted.get(Matrix.Y),
                dx=wanted.get(Matrix.DX),
            )
        )

        def end() -> None:
            if wait is not None:
                wait()
            for matrix, array in wanted.items():
                self.results[matrix][part] = array
            for array in views.values():
                array.view(np.uint8)[...] = 0xFF

        self._in_flight.append(end)
        self._next += 1
        return True

    def finish(self) -> dict[Matrix, Any]:
        """Waits for everything on the device worker; the results."""
        while self._in_flight:
            self._in_flight.popleft()()
        if self._spec.sums:
            sums = self._job.finish()
            self.results |= {each: np.array(array) for each, array in sums.items()}
        self.close()
        return self.results

    def close(self) -> None:
        """Gives the job up, which may be done more than once."""
        self._job.close()
        self._job.close()

    def _matrix(self, shape: tuple[int, ...], dtype: Any) -> Any:
        size = int(np.prod(shape)) * dtype.itemsize
        return self._empty(size)[:size].view(dtype).reshape(shape)

    def _slot(self) -> dict[Matrix, Any]:
        return {
            matrix: self._matrix(
                (self._rows, self._spec.row_length(matrix)),
                self._spec.results.get(matrix, self._spec.dtype).numpy,
            )
            for matrix in (Matrix.X, Matrix.DY, Matrix.Y, Matrix.DX)
        }


def run(
    backend: Any, spec: JobSpec, given: Sequence[Any], block_rows: int, **options: Any
) -> dict[Matrix, Any]:
    """The wanted results, computed block by block."""
    job = Run(backend, spec, given, block_rows, **options)
    while job.step():
        pass
    return job.finish()
