"""The version, installed or not."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np

import gradwire
from gradwire_protocol.version import VERSION

ROOT = Path(gradwire.__file__).parents[2]

PROGRAM = """
import sys
from importlib import metadata

def none(name):
    raise metadata.PackageNotFoundError(name)

metadata.version = none  # as where gradwire was never installed
import numpy, gradwire, gradwire_server
with gradwire_server.start_in_thread() as server:
    with gradwire.connect(server.addresses[0]) as client:
        y = client.forward(numpy.ones((3, 2), "f4"), numpy.ones((2, 4), "f4"))
        print(client.server_info().version, float(y.sum()))
"""


def test_it_is_that_of_the_distribution():
    assert metadata.version("gradwire") == VERSION


def test_the_sources_alone_are_enough_to_compute():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}/client:{ROOT}/protos:{ROOT}/server"},
    )
    assert done.stdout == f"0+source {float(np.full((3, 4), 2).sum())}\n"
