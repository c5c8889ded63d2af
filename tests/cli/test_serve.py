"""`gradwire serve`: one line when it is ready, a log, and an orderly end."""

from __future__ import annotations

import json
import re
import signal
import socket
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import gradwire as sdk
from tests.cli.conftest import (
    ended_by,
    gradwire,
    sentence,
    started,
)
from tests.support.metrics import scrape

READY = re.compile(r"gradwire (\S+) serves on (.+) \((\w+): .+\)\n")


def addresses(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout is not None
    ready = READY.fullmatch(process.stdout.readline())
    assert ready is not None
    return ready[2].split(", ")


def test_the_ready_line_names_addresses_that_answer_and_sigterm_ends_it(
    tmp_path: Path,
) -> None:
    path = tmp_path / "socket"
    with started("serve", "--listen=127.0.0.1:0", f"--listen=unix:{path}") as process:
        found = addresses(process)
        assert re.fullmatch(r"127\.0\.0\.1:[1-9]\d*", found[0])
        assert found[1] == f"unix:{path}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        for address in found:
            with sdk.connect(address) as client:
                assert client.forward(np.ones((2, 3)), np.ones((3, 1))).sum() == 6
        out, err = ended_by(process, signal.SIGTERM)
        assert process.returncode == 0
        assert out == ""
        assert "Traceback" not in err
    assert not path.exists()


def test_the_ready_line_names_the_ports_beside_it_that_were_asked_for() -> None:
    asked = ("--listen=127.0.0.1:0", "--metrics-listen=0", "--health-listen=0")
    with started("serve", *asked) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(
            r"\), metrics on (http://127\.0\.0\.1:[1-9]\d*/metrics), "
            r"health on (127\.0\.0\.1:[1-9]\d*)\n",
            line,
        )
        assert found is not None, line
        assert scrape(found[1]).sum("running_jobs_limit") == 64
        host, port = found[2].split(":")
        socket.create_connection((host, int(port)), timeout=10).close()
        _, err = ended_by(process, signal.SIGTERM)
    serving = json.loads(err.splitlines()[0])
    assert (serving["metrics"], serving["health"]) == found.groups()


def test_ctrl_c_ends_it_in_order() -> None:
    with started("serve", "--listen", "127.0.0.1:0") as process:
        addresses(process)
        out, err = ended_by(process, signal.SIGINT)
        assert process.returncode == 0
        assert out == ""
        assert "Traceback" not in err


def test_the_log_has_one_json_object_for_each_job() -> None:
    with started("serve", "--listen", "127.0.0.1:0", "--log-level=info") as process:
        (address,) = addresses(process)
        with sdk.connect(address) as client:
            client.gradients(
                np.ones((6, 5)), np.ones((5, 4)), np.ones((6, 4)), request_id="mine"
            )
        _, err = ended_by(process, signal.SIGTERM)
    entries = [json.loads(line) for line in err.splitlines()]
    assert all({"event", "level", "logger", "timestamp"} <= set(e) for e in entries)
    (job,) = [entry for entry in entries if entry.get("job_id") == "mine"]
    assert (job["m"], job["n"], job["k"], job["dtype"]) == (6, 5, 4, "float64")
    assert job["outcome"] == "OK"
    assert job["level"] == "info"


def test_the_log_can_be_for_people_and_of_fewer_entries() -> None:
    with started(
        "serve", "--listen=127.0.0.1:0", env={"GRADWIRE_LOG_FORMAT": "console"}
    ) as process:
        addresses(process)
        _, err = ended_by(process, signal.SIGTERM)
        assert re.search(r"\[info +\] serving", err)
        assert "\x1b" not in err
    with started("serve", "--listen=127.0.0.1:0", "--log-level", "warning") as process:
        addresses(process)
        assert ended_by(process, signal.SIGTERM) == ("", "")


def test_a_ready_line_that_cannot_be_printed_ends_it_in_order(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with Path("/dev/full").open("w") as full:
        flags = (f"--listen=unix:{path}", "--log-level=warning")
        done = gradwire("serve", *flags, stdout=full)
    assert done.stderr == "gradwire: No space left on device\n"
    assert done.returncode == 1
    assert not path.exists()


def test_an_address_that_cannot_be_had_is_a_sentence(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = gradwire("serve", "--listen", address)
        assert done.returncode == 1
        assert address in sentence(done)
        assert "in use" in sentence(done)
    long = "unix:/tmp/" + "x" * 120
    for listen, text in (
        (f"unix:{tmp_path}", "taken by something that is no socket"),
        (long, "the path has 125 bytes"),
        ("nonsense", "expected HOST:PORT or unix:PATH"),
        ("no-such-host.invalid:1", "no-such-host.invalid:1"),
    ):
        done = gradwire("serve", "--listen", listen)
        assert done.returncode == 1
        assert text in sentence(done)


def test_traces_that_cannot_be_sent_are_a_sentence() -> None:
    pigeon = {"OTEL_EXPORTER_OTLP_PROTOCOL": "pigeon"}
    done = gradwire("serve", "--listen=127.0.0.1:0", "--traces", env=pigeon)
    assert done.returncode == 1
    assert "OTEL_EXPORTER_OTLP_PROTOCOL is 'pigeon'" in sentence(done)


def test_plaintext_beyond_this_host_has_to_be_asked_for() -> None:
    done = gradwire("serve", "--listen", "0.0.0.0:0")
    assert done.returncode == 1
    assert "cannot listen on 0.0.0.0:0 in plaintext" in sentence(done)
    assert "--tls-cert and --tls-key, or --insecure" in sentence(done)
    with started("serve", "--listen", "0.0.0.0:0", "--insecure") as process:
        (address,) = addresses(process)
        port = address.rpartition(":")[2]
        with sdk.connect(f"127.0.0.1:{port}") as client:
            assert client.forward(np.ones((2, 3)), np.ones((3, 1))).sum() == 6
        _, err = ended_by(process, signal.SIGTERM)
    warnings = [e for e in map(json.loads, err.splitlines()) if e["level"] == "warning"]
    assert [entry["address"] for entry in warnings] == ["0.0.0.0:0"]


def test_a_backend_that_is_not_there_is_a_sentence() -> None:
    done = gradwire(
        *("serve", "--backend", "cupy", "--listen", "127.0.0.1:0"),
        env={"CUDA_VISIBLE_DEVICES": ""},  # as on a host that has none
    )
    assert done.returncode == 1
    assert "cupy" in sentence(done).lower()


class SlowRows:
    """Rows of a job, the last of which come when they are let go."""

    def __init__(self) -> None:
        self.go_on = threading.Event()

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        pair = (np.ones((8, 3), np.float32), np.ones((8, 2), np.float32))
        yield pair
        yield pair
        self.go_on.wait(30)
        yield pair


def test_a_running_job_is_finished_before_the_end() -> None:
    rows = SlowRows()
    with started(
        "serve", "--listen=127.0.0.1:0", "--row-block-bytes=128", "--grace=30"
    ) as process:
        (address,) = addresses(process)
        with (
            sdk.connect(address) as client,
            client.stream(rows, np.ones((3, 2), np.float32)) as stream,
        ):
            next(stream)
            process.send_signal(signal.SIGTERM)
            assert process.stderr is not None
            assert any("draining" in line for line in process.stderr)
            refused = gradwire("health", "--address", address)
            assert refused.returncode == 1
            assert "NOT_SERVING" in sentence(refused)
            rows.go_on.set()
            for _ in stream:
                pass
            assert stream.receipt.m == 24
        process.communicate(timeout=30)
        assert process.returncode == 0


def test_the_second_signal_stops_at_once() -> None:
    rows = SlowRows()
    with started(
        "serve", "--listen=127.0.0.1:0", "--row-block-bytes=128", "--grace=600"
    ) as process:
        (address,) = addresses(process)
        with (
            sdk.connect(address, retries=False) as client,
            client.stream(rows, np.ones((3, 2), np.float32)) as stream,
        ):
            next(stream)
            process.send_signal(signal.SIGINT)
            assert process.stderr is not None
            assert any("draining" in line for line in process.stderr)
            _, err = ended_by(process, signal.SIGINT)
            assert process.returncode == 0
            assert "Traceback" not in err
            rows.go_on.set()
            with pytest.raises(sdk.GradwireError):
                for _ in stream:
                    pass
