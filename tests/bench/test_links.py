"""The bench behind a link: it is limited, and nothing of it is left."""

import os
import shutil
import subprocess
import sys

import pytest

from bench.links.command import LINKS, main
from bench.links.namespaces import LinkError, link
from bench.report.record import Run


def namespaces():
    """Those of this process: other tests make links at the same time."""
    listed = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True)
    names = {line.split()[0] for line in listed.stdout.splitlines()}
    return {name for name in names if name.endswith(f"-{os.getpid()}")}


def require_links(round_trip_s=0.0):
    if os.geteuid() or not (shutil.which("ip") and shutil.which("tc")):
        pytest.skip("needs root and iproute2")
    try:
        with link(1e9, round_trip_s):
            pass
    except LinkError as error:
        pytest.skip(f"this host does not let links be made: {error}")


@pytest.fixture
def possible():
    require_links()


def test_both_ends_of_a_link_are_limited_and_removed(possible):
    before = namespaces()
    with link(1e9):
        made = namespaces() - before
        assert len(made) == 2
        for name in made:
            command = ["tc", "-n", name, "qdisc", "show", "dev", "bench0"]
            shown = subprocess.run(command, capture_output=True, text=True, check=True)
            assert "tbf" in shown.stdout
            assert "rate 1Gbit" in shown.stdout
    assert namespaces() == before


def test_a_link_may_take_its_time():
    require_links(round_trip_s=0.06)
    before = namespaces()
    with link(1e9, round_trip_s=0.06) as run:
        client = (
            "import socket, sys, time\n"
            "with socket.create_server(('10.77.0.1', 0)) as there:\n"
            "    started = time.perf_counter()\n"
            "    try:\n"
            "        socket.create_connection(('10.77.0.2', 9), timeout=20)\n"
            "    except ConnectionRefusedError:\n"
            "        print(time.perf_counter() - started)\n"
        )
        command = [*run, sys.executable, "-c", client]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert float(done.stdout) >= 0.06
    assert namespaces() == before


def test_client_and_server_work_at_the_two_ends(possible, tmp_path, capsys):
    out = tmp_path / "run.jsonl"
    line = f"--gbits 1 --shape 8 --rounds 1 --contenders numpy,raw-tcp --out {out}"
    assert main(line.split()) == 0
    (part,) = Run.read(out).parts
    assert part.link_bits_per_s == 1e9
    assert [figure.contender for figure in part.figures] == ["numpy", "raw-tcp"]
    assert "| 1 Gbit/s | 8³ " in capsys.readouterr().out


@pytest.mark.thorough
def test_gradwire_works_over_every_link_of_the_bench(possible, tmp_path, capsys):
    require_links(round_trip_s=0.02)
    before = namespaces()
    out = tmp_path / "run.jsonl"
    # Its calls go over gRPC too, so it needs both of a server's ports.
    name = "gradwire-direct"
    assert main(["--quick", "--contenders", name, "--out", str(out)]) == 0
    made = [
        (part.link_bits_per_s, part.round_trip_s, part.products)
        for part in Run.read(out).parts
    ]
    assert made == [
        (1e9, 0.0, True),
        (1e10, 0.0, True),
        (1e9, 0.02, True),
        (1e10, 0.0, False),
    ]
    for part in Run.read(out).parts:
        (figure,) = part.figures
        assert figure.contender == name
        # No call is sooner than its bytes and the trip there and back.
        wire_s = 8 * part.shape.bytes_each_way / part.link_bits_per_s
        least_s = max(wire_s, part.round_trip_s)
        assert figure.min_s > least_s
    printed = capsys.readouterr().out
    assert all(f"| {one.label}" in printed for one in LINKS)
    assert namespaces() == before


def test_what_is_missing_is_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    line = f"--gbits 1 --contenders numpy --out {tmp_path / 'run.jsonl'}"
    assert main(line.split()) == 1
    assert "there is no ip: install iproute2" in capsys.readouterr().err
