"""gradwire: ``gradwire serve`` with default settings, and the SDK, over TCP."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import gradwire
from bench.contenders.server_process import ServerProcess
from bench.work import Array


class GradwireTcp:
    """One client, one connection, one call after the other."""

    server_pid: int | None = None

    def __init__(self) -> None:
        self._server: ServerProcess | None = None
        self._client: gradwire.Client | None = None

    def start(self) -> None:
        gradwire_command = str(Path(sys.executable).with_name("gradwire"))
        command = [gradwire_command, "serve", "--listen", "127.0.0.1:0"]
        command += ["--backend", "numpy"]
        if threads := os.environ.get("OPENBLAS_NUM_THREADS"):
            command += ["--cpu-threads", threads]
        # The line that every job leaves in the log would stand in the table.
        command += ["--log-level", "warning"]
        self._server = ServerProcess.start(command)
        self.server_pid = self._server.pid
        self._client = gradwire.connect(self._server.address)

    def gradients(self, x: Array, w: Array, dy: Array) -> tuple[Array, Array, Array]:
        assert self._client is not None
        results = self._client.gradients(x, w, dy)
        return results.y, results.dx, results.dw

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
        if self._server is not None:
            self._server.stop()


create = GradwireTcp
