"""`gradwire serve`, as it is, on devices that fail for good.

Run as a script with the command's arguments. The second device fails at the
first row block that it is given, and with "hangs" as the first argument the
first one then computes for ever.
"""

from __future__ import annotations

import dataclasses
import sys
import threading

from gradwire_cli.app import run
from gradwire_server.backends import select
from gradwire_server.backends.base import DeviceLostError
from gradwire_server.backends.numpy.backend import NumpyBackend


class LosingBackend(NumpyBackend):
    """Two devices, of which the second is about to fail."""

    inline_below_ops = 0

    def __init__(self, hangs: bool) -> None:
        super().__init__()
        (cpu,) = self.devices
        self.devices = (cpu, dataclasses.replace(cpu, index=1, name="a broken one"))
        self._hangs = hangs

    def open_job(self, spec, block_rows, device, **options):
        job = super().open_job(spec, block_rows, 0, **options)
        if device == 1:
            job.compute_block = _fail
        elif self._hangs:
            job.compute_block = _hang
        return job


def _hang(_: object) -> None:
    print("hangs", flush=True)
    threading.Event().wait()


def _fail(_: object) -> None:
    raise DeviceLostError("an illegal memory access was encountered")


if __name__ == "__main__":
    hangs = sys.argv[1] == "hangs"
    select.choose = lambda _: (LosingBackend(hangs), "as given")
    sys.exit(run(sys.argv[2:]))
