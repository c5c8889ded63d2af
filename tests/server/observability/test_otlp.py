"""Spans that cannot be sent cost no job and no stop of a server anything."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

import gradwire
from gradwire_server import Server, Settings, TracesError
from tests.support.serving import running_server

A = np.ones((4, 4), np.float32)
LOST = "traces cannot be sent; jobs are not affected"
FLUSH_S = 2.0
"""For the last spans, says docs/operating.md."""


@contextmanager
def unanswering() -> Iterator[str]:
    """The address of a port that takes connections and never answers."""
    held: list[socket.socket] = []

    def accept() -> None:
        try:
            while True:
                held.append(listener.accept()[0])
        except OSError:
            return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()
    for each in held:
        each.close()


def test_a_dead_collector_is_told_of_once_and_nothing_waits_for_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
    env = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": nobody,
        "OTEL_EXPORTER_OTLP_TIMEOUT": "0.5",  # no second try for a batch
        "OTEL_BSP_SCHEDULE_DELAY": "20",
        "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "4",  # 21 batches
    }
    with running_server(traces=True, env=env) as server:
        with gradwire.connect(server.address) as client:
            client.gradients(A, A, A)
            told = server.wait_for_log(LOST)
            for _ in range(20):
                client.gradients(A, A, A)
        server.process.terminate()
        server.process.wait(20)
        lost = [each for each in server.records if each["message"] == LOST]
        others = [each for each in server.records if "opentelemetry" in each["name"]]
    assert told["endpoint"] == nobody
    assert "UNAVAILABLE" in told["error"]
    assert len(lost) <= 2  # once, and how many more were lost at the end
    assert sum(each["lost_spans"] for each in lost) == 21 * 4
    assert not [each for each in others if each["levelname"] != "DEBUG"]


@pytest.mark.thorough
def test_a_collector_that_does_not_answer_delays_a_stop_by_two_seconds() -> None:
    with unanswering() as address:
        env = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{address}"}
        with running_server(traces=True, env=env) as server:
            with gradwire.connect(server.address) as client:
                client.gradients(A, A, A)
            asked = time.monotonic()
            server.process.terminate()
            assert server.process.wait(20) == 0
            took_s = time.monotonic() - asked
            (lost,) = [each for each in server.records if each["message"] == LOST]
    assert lost["lost_spans"] == 4
    assert FLUSH_S - 0.1 < took_s < FLUSH_S + 3


def test_without_the_extra_a_server_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("opentelemetry.sdk.trace", "opentelemetry.sdk.trace.export"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(
        sys.modules, "gradwire_server.observability.otlp", raising=False
    )
    with pytest.raises(TracesError, match=r"install gradwire\[otel\]"):
        Server(Settings(backend="numpy", traces=True))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (
            "OTEL_EXPORTER_OTLP_PROTOCOL",
            "pigeon",
            "OTEL_EXPORTER_OTLP_PROTOCOL is 'pigeon': expected grpc or http/protobuf",
        ),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon", "could not convert string to float"),
    ],
)
def test_a_variable_of_opentelemetry_that_is_wrong_is_an_error_at_the_start(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(TracesError, match=said):
        Server(Settings(backend="numpy", traces=True))
