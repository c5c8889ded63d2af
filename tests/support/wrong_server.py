"""`gradwire serve`, as it is, on a device that computes wrongly when it is told.

Run as a script with a file's name and the command's arguments. The file holds
the fault of the jobs that are opened then, as JSON; see `Fault`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from gradwire_cli.app import run
from gradwire_server.backends import select
from gradwire_server.backends.numpy.backend import NumpyBackend


@dataclasses.dataclass(frozen=True)
class Fault:
    """What goes wrong."""

    kind: str = "none"
    """"element": one, by so much. "block": a whole block is zeros. "swapped": two
    rows are each other's. "twice", "left-out": a block's share of dW."""
    result: str = "dw"
    row: int = 0
    """Within a block of y and dx."""
    column: int = 0
    by: float = 0.0
    block: int = 1

    def spoil(self, matrix: Any) -> None:
        """Does it to a result, or a block of one."""
        if self.kind == "element":
            matrix[self.row, self.column] += matrix.dtype.type(self.by)
        elif self.kind == "block":
            matrix[...] = 0
        elif self.kind == "swapped":
            matrix[[0, 1]] = matrix[[1, 0]]


class WrongJob:
    """A job on that device."""

    def __init__(self, job: Any, fault: Fault) -> None:
        self._job = job
        self._fault = fault
        self._blocks = 0
        self._w: Any = None

    def take_w(self, w: Any) -> None:
        self._w = w
        self._job.take_w(w)

    def compute_block(self, block: Any) -> None:
        fault, now = self._fault, self._blocks == self._fault.block
        self._blocks += 1
        if now and fault.kind == "left-out":
            self._without_share(block)
            return
        self._job.compute_block(block)
        if now and fault.kind == "twice":
            self._job.compute_block(block)
        elif now and fault.result in {"y", "dx"}:
            fault.spoil(getattr(block, fault.result))

    def finish(self) -> Any:
        sums = self._job.finish()
        for matrix, array in sums.items():
            if self._fault.result == matrix.label:
                self._fault.spoil(array)
        return sums

    def kept_sums(self) -> Any:
        sums = self._job.kept_sums()
        for matrix, array in sums.items():
            if self._fault.result == matrix.label:
                self._fault.spoil(array.host)
        return sums

    def close(self) -> None:
        self._job.close()

    def _without_share(self, block: Any) -> None:
        if block.y is None and block.dx is None:
            return
        nothing = np.zeros_like(block.x)
        self._job.compute_block(dataclasses.replace(block, x=nothing))
        if block.y is not None:
            block.y[...] = block.x.astype(np.float64) @ self._w.astype(np.float64)


class WrongBackend(NumpyBackend):
    """One device, which does what the file says."""

    def __init__(self, faults: Path) -> None:
        super().__init__()
        self._faults = faults

    def open_job(self, *arguments: Any, **options: Any) -> Any:
        fault = Fault(**json.loads(self._faults.read_text()))
        return WrongJob(super().open_job(*arguments, **options), fault)


if __name__ == "__main__":
    backend = WrongBackend(Path(sys.argv[1]))
    select.choose = lambda _: (backend, "as given")
    sys.exit(run(sys.argv[2:]))
