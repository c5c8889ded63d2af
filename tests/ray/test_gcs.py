"""The loss of Ray's GCS, without which Ray ends its nodes and programs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.ray.conftest import RayCluster, gradwire_ray, wait_for

# A stream that goes on until its standard input ends, and then another job.
PROGRAM = """
import sys
import numpy as np
import gradwire.ray

x, w, dy = np.ones((100, 50)), np.ones((50, 40)), np.ones((100, 40))
rows = 0

def parts():
    global rows
    while True:
        rows += len(x)
        yield x, dy
        print("sent", flush=True)
        if not sys.stdin.readline():
            return

with gradwire.ray.connect() as client:
    stream = client.stream(parts(), w)
    for block in stream:
        pass
    assert (stream.dw == rows).all(), (stream.dw, rows)
    print("streamed", flush=True)
    assert (client.gradients(x, w, dy).dw == 100).all()
    print("computed", flush=True)
"""


def test_jobs_go_on_without_the_gcs_and_the_nodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A minute by default.
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "4")
    cluster = RayCluster()
    try:
        cluster.add()
        gradwire_ray(cluster, "up", "--port", "0")
        env = os.environ | {"RAY_ADDRESS": cluster.address}
        del env["RAY_gcs_rpc_server_reconnect_timeout_s"]
        with subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        ) as program:
            assert program.stdin is not None
            assert program.stdout is not None
            assert program.stdout.readline() == "sent\n"
            (raylet,) = cluster.nodes["127.0.0.2"].all_processes["raylet"]
            cluster.kill_gcs()
            wait_for(lambda: raylet.process.poll() is not None)
            program.stdin.write("\n")
            program.stdin.close()
            left = program.stdout.read()
        assert program.returncode == 0
        assert left.splitlines()[-2:] == ["streamed", "computed"]
    finally:
        cluster.stop()
