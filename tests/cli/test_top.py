"""``gradwire top``: what servers do, for people and for scripts."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest

import gradwire as sdk
from gradwire_cli.errors import CommandError
from gradwire_cli.load.metrics_page import MetricsPage, url_of
from gradwire_cli.load.server_load import load_between
from tests.cli.conftest import COMMAND, environment, gradwire, sentence
from tests.support.credentials import make_tokens
from tests.support.observing import wait_until
from tests.support.serving import ServerProcess, running_server

SIZE = 128
JOB_BYTES = 3 * SIZE * SIZE * 4
JOB_OPERATIONS = 6 * SIZE**3


class Metered(NamedTuple):
    """A server of one tenant, which it counts by name."""

    server: ServerProcess
    token: str


@pytest.fixture(scope="module")
def metered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Metered]:
    tokens, text = make_tokens("alice")
    file = tmp_path_factory.mktemp("tokens") / "tokens.toml"
    file.write_text(text)
    with running_server(
        metrics_listen="0", metrics_tenants=True, auth_tokens=str(file)
    ) as server:
        yield Metered(server, tokens["alice"])


@contextmanager
def jobs_one_by_one(address: str, token: str) -> Iterator[list[int]]:
    """A client that computes meanwhile; the list has the number of its jobs."""
    done = [0]
    stop = threading.Event()
    operands = [np.ones((SIZE, SIZE), np.float32)] * 3

    def compute() -> None:
        with sdk.connect(address, token=token, transport="tcp") as client:
            while not stop.is_set():
                client.gradients(*operands)
                done[0] += 1

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        yield done
    finally:
        stop.set()
        thread.join()


def test_the_load_is_what_clients_do(metered: Metered) -> None:
    server = metered.server
    with ExitStack() as open_:
        client = open_.enter_context(sdk.connect(server.address, token=metered.token))
        session = open_.enter_context(client.session("1MiB"))
        session.put(np.ones((100, 100), np.float32))
        jobs = open_.enter_context(jobs_one_by_one(server.address, metered.token))
        wait_until(lambda: jobs[0] > 0, "a job")
        before = jobs[0]
        done = gradwire("top", server.metrics_url, "--json", "--interval", "1")
        most = jobs[0] - before + 1
        assert done.returncode == 0, done.stderr
        load = json.loads(done.stdout)
        shown = gradwire("top", server.metrics_url, "--interval", "0.2").stdout
    ended = load["jobs"]["ended_per_s"] * load["interval_s"]
    assert ended == pytest.approx(round(ended), abs=1e-6)
    assert 0 < round(ended) <= most
    # Calls that run at a reading have moved and computed a part of theirs.
    for field, of_one in (
        ("received_per_s", JOB_BYTES),
        ("sent_per_s", JOB_BYTES),
        ("flop_per_s", JOB_OPERATIONS),
    ):
        count = load[field] * load["interval_s"] / of_one
        assert ended - 1 <= count <= ended + 1, field
    assert load["jobs"]["failed_per_s"] == 0
    assert load["jobs"]["mean_duration_s"] > load["jobs"]["mean_wait_s"] >= 0
    assert load["sessions"] | {"limit": 0} == {
        "open": 1,
        "used": 40_000,
        "reserved": 1 << 20,
        "limit": 0,
    }
    (device,) = load["devices"]
    assert device["flop_per_s"] == load["flop_per_s"]
    (tenant,) = load["tenants"]
    assert tenant["tenant"] == "alice"
    assert tenant["held"] >= 1 << 20
    assert "1 open, 1 MiB of" in shown
    assert re.search(r"jobs .* of 64 running, .*/s ended in .* each, 0/s failed", shown)
    assert re.search(r"alice +\d +0 ", shown)


def test_a_terminal_shows_every_interval_until_ctrl_c(metered: Metered) -> None:
    with running_server(metrics_listen="0") as other:
        with on_terminal(metered.server.metrics_url, other.metrics_url) as screen:
            wait_until(
                lambda: screen.text().count("0 of 64 running") >= 4, "two tables each"
            )
            os.kill(other.process.pid, signal.SIGKILL)
            wait_until(lambda: "nothing listens at" in screen.text(), "its failure")
            seen = screen.text().count("0 of 64 running")
            wait_until(
                lambda: screen.text().count("0 of 64 running") > seen, "one more table"
            )
            screen.process.send_signal(signal.SIGINT)
            assert screen.process.wait(20) == 0
        assert "Traceback" not in screen.text()


class Screen:
    """A command on a terminal, and all that it wrote."""

    def __init__(self, process: subprocess.Popen[bytes], terminal: int) -> None:
        self.process = process
        self._terminal = terminal
        self._seen = b""

    def text(self) -> str:
        """All that was written until now."""
        while True:
            try:
                self._seen += os.read(self._terminal, 65536)
            except OSError:  # nothing more at present, or the command has ended
                return self._seen.decode(errors="replace")


@contextmanager
def on_terminal(*arguments: str) -> Iterator[Screen]:
    ours, its = pty.openpty()
    os.set_blocking(ours, False)
    process = subprocess.Popen(
        [*COMMAND, "top", *arguments, "--interval", "0.2"],
        env=environment({"COLUMNS": "120", "LINES": "40", "TERM": "xterm"}),
        stdin=its,
        stdout=its,
        stderr=its,
    )
    try:
        os.close(its)
        yield Screen(process, ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


@pytest.mark.parametrize("given", ["a b", "ftp://host:1", "host", "http://host", ""])
def test_what_is_no_address_is_refused(given: str) -> None:
    with pytest.raises(CommandError, match=re.escape(f"{given!r} is no address")):
        url_of(given)


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("9464", "http://127.0.0.1:9464/metrics"),
        ("gpu-node:9464", "http://gpu-node:9464/metrics"),
        ("[::1]:9464", "http://[::1]:9464/metrics"),
        ("http://gpu-node:9464/", "http://gpu-node:9464/metrics"),
        ("https://gpu-node:443/gradwire", "https://gpu-node:443/gradwire"),
    ],
)
def test_addresses_are_those_of_the_metrics(given: str, url: str) -> None:
    assert url_of(given) == url


def test_a_server_without_metrics_is_told_how_to_have_them(
    metered: Metered,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    said = sentence(gradwire("top", port))
    assert said == (
        f"nothing listens at http://127.0.0.1:{port}/metrics: a server has metrics"
        " with gradwire serve --metrics-listen 9464"
    )
    wrong = metered.server.metrics_url.replace("/metrics", "/other")
    assert sentence(gradwire("top", wrong)) == f"{wrong} answers 404 Not Found"


def page(read_at: float, **values: float) -> MetricsPage:
    build: dict[str, Any] = {"build_info": (({"version": "1", "backend": "x"}, 1.0),)}
    samples = {name: (({}, value),) for name, value in values.items()}
    return MetricsPage(read_at, build | samples)


def test_a_server_that_was_started_anew_has_no_negative_rates() -> None:
    first = page(10.0, sent_bytes_total=5000.0)
    last = page(12.0, sent_bytes_total=100.0)
    assert load_between("url", first, last).sent_per_s == 50.0
