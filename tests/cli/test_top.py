"""``gradwire top``: what servers do, for people and for scripts."""

from __future__ import annotations

import http.server
import io
import json
import os
import pty
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np
import pytest

import gradwire as sdk
from gradwire_cli.app import run
from gradwire_cli.errors import CommandError
from gradwire_cli.load.metrics_page import MAX_BYTES, MetricsPage, read_metrics, url_of
from gradwire_cli.load.screen import server_table
from gradwire_cli.load.server_load import load_between
from gradwire_cli.terminal.tables import console
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
        with sdk.connect(address, token=token, transport="grpc") as client:
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


class Answers:
    """A server that answers every request with some bytes, one after the other."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.pause_s = 0.0
        answers = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with suppress(OSError):  # the client may have left
                    for part in answers.parts:
                        self.wfile.write(part)
                        time.sleep(answers.pause_s)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/metrics"

    def page(self, text: str) -> str:
        """Answer with a page from now on; return its URL."""
        self.parts = [b"HTTP/1.0 200 OK\r\n\r\n", text.encode()]
        return self.url


@pytest.fixture(scope="module")
def answers() -> Iterator[Answers]:
    made = Answers()
    thread = threading.Thread(target=made.server.serve_forever, args=(0.01,))
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


BUILD = 'gradwire_build_info{version="1",backend="x"} 1\n'
DEVICE = 'gradwire_device_info{device="0",name="n",backend="x"} 1\n'
SEQUENCES = "\x1b[2J\x1b]0;title\x07\x9b31m\u202e"


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ("gradwire_running_jobs NaN", "gradwire_running_jobs is nan"),
        ("gradwire_running_jobs 1e400", "gradwire_running_jobs is inf"),
        ("gradwire_memory_held_bytes -Inf", "gradwire_memory_held_bytes is -inf"),
        ("gradwire_build_info 1", "gradwire_build_info has no label 'version'"),
        ("gradwire_device_info 1", "gradwire_device_info has no label 'device'"),
        (DEVICE.replace('"0"', '"a"'), "gradwire_device_info has a device without"),
        ("gradwire_tenant_jobs_total 1", "tenant_jobs_total has no label 'tenant'"),
        ("# " + "x" * MAX_BYTES, "it has more than 4 MiB"),
        ("gradwire_running_jobs " + "x" * 10_000, "could not convert"),
    ],
    ids=lambda text: text[:30],
)
def test_a_page_that_is_no_servers_is_a_sentence(
    wrong: str, why: str, answers: Answers
) -> None:
    with pytest.raises(CommandError, match="cannot be read: ") as raised:
        read_metrics(answers.page(f"{BUILD}{wrong}\n"), 5.0)
    assert why in str(raised.value)
    assert len(str(raised.value)) < 400


def test_a_page_that_comes_by_and_by_is_not_waited_for_without_end(
    answers: Answers,
) -> None:
    answers.page(BUILD)
    answers.parts += [b"#\n"] * 400
    answers.pause_s = 0.05
    began = time.monotonic()
    try:
        with pytest.raises(CommandError, match=r"did not answer within 0\.5 s"):
            read_metrics(answers.url, 0.5)
    finally:
        answers.pause_s = 0.0
    assert time.monotonic() - began < 10


def test_many_tenants_and_devices_are_counted_in_one_pass(answers: Answers) -> None:
    names = [f"t{number}" for number in range(20_000)]
    text = BUILD + "".join(
        f'gradwire_tenant_jobs_total{{tenant="{name}"}} 1\n'
        f'gradwire_tenant_running_jobs{{tenant="{name}"}} 2\n'
        for name in names
    )
    read = read_metrics(answers.page(text), 30.0)
    began = time.process_time()
    load = load_between("url", read, read)
    assert time.process_time() - began < 5
    assert load.tenants is not None
    assert [each.tenant for each in load.tenants] == sorted(names)
    assert {each.running for each in load.tenants} == {2}


def test_no_text_of_a_server_reaches_the_terminal_as_a_command(
    answers: Answers, capsys: pytest.CaptureFixture[str]
) -> None:
    text = BUILD.replace('"1"', f'"v{SEQUENCES}"')
    text += DEVICE.replace('"n"', f'"Ü{SEQUENCES}"')
    text += f'gradwire_tenant_jobs_total{{tenant="t{SEQUENCES}"}} 1\n'
    read = read_metrics(answers.page(text), 5.0)
    shown = io.StringIO()
    console(shown).print(server_table(load_between("url", read, read)))
    written = shown.getvalue()
    assert written.replace("\n", "").isprintable()
    for name in ("v", "Ü", "t"):
        assert f"{name}?[2J?]0;title" in written
    answers.parts = [
        f"HTTP/1.0 500 no {SEQUENCES}\r\n\r\n".encode("latin-1", "replace")
    ]
    assert run(["top", answers.url, "--once"]) == 1
    said = capsys.readouterr().err
    assert said.replace("\n", "").isprintable()
    assert "answers 500 no ?[2J" in said


def page(read_at: float, **values: float) -> MetricsPage:
    build: dict[str, Any] = {"build_info": (({"version": "1", "backend": "x"}, 1.0),)}
    samples = {name: (({}, value),) for name, value in values.items()}
    return MetricsPage(read_at, build | samples)


def test_a_server_that_was_started_anew_has_no_negative_rates() -> None:
    first = page(10.0, sent_bytes_total=5000.0)
    last = page(12.0, sent_bytes_total=100.0)
    assert load_between("url", first, last).sent_per_s == 50.0


def test_a_port_of_grpc_is_told_without_what_it_sends(server: ServerProcess) -> None:
    url = f"http://{server.address}/metrics"
    with pytest.raises(CommandError) as raised:
        read_metrics(url, 5.0)
    assert str(raised.value) == f"{url} cannot be read: no HTTP server answers"
