"""The bench behind a link: it is limited, and nothing of it is left."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.links.command import LinkError, link, main
from bench.report.record import Run


def namespaces():
    listed = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True)
    return {line.split()[0] for line in listed.stdout.splitlines()}


@pytest.fixture
def possible():
    if os.geteuid() or not (shutil.which("ip") and shutil.which("tc")):
        pytest.skip("needs root and iproute2")
    try:
        with link(1e9):
            pass
    except LinkError as error:
        pytest.skip(str(error))


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
    if os.geteuid() or not (shutil.which("ip") and Path("/dev/net/tun").exists()):
        pytest.skip("needs root, iproute2 and TUN devices")
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


def test_what_is_missing_is_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    line = f"--gbits 1 --contenders numpy --out {tmp_path / 'run.jsonl'}"
    assert main(line.split()) == 1
    assert "there is no ip: install iproute2" in capsys.readouterr().err
