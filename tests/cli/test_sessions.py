"""``gradwire sessions``: what an operator sees of the sessions, and can close."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import gradwire as sdk
from tests.cli.conftest import gradwire
from tests.support.serving import ServerProcess, running_server


def test_sessions_are_listed_and_closed(server: ServerProcess) -> None:
    def listed(*flags: str) -> str:
        done = gradwire("sessions", "list", "--address", server.address, *flags)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert listed() == "no session is open\n"
    with (
        sdk.connect(server.address) as client,
        client.session("1MiB", label="a run") as s,
    ):
        weight = s.put(np.ones((100, 100), np.float32))
        s.put(np.ones((10, 10), np.float32))
        (about,) = (json.loads(line) for line in listed("--json").splitlines())
        assert about["label"] == "a run"
        assert about["tensors"] == 2
        assert about["used_bytes"] == 40_400
        assert about["keep_bytes"] == 1 << 20
        heading, row = listed().splitlines()
        assert heading.split()[0] == "session"
        assert row.startswith(about["id"])
        assert s.token not in row
        done = gradwire("sessions", "close", about["id"], "--address", server.address)
        assert done.stdout == f"{about['id']} is closed\n"
        with pytest.raises(sdk.SessionLostError):
            s.get(weight)
    assert listed() == "no session is open\n"


def test_a_session_is_described_with_its_tensors(server: ServerProcess) -> None:
    def described(*arguments: str) -> str:
        done = gradwire("sessions", "describe", *arguments, "--address", server.address)
        assert done.returncode == 0, done.stderr
        return done.stdout

    with (
        sdk.connect(server.address) as client,
        client.session("1MiB", label="a run") as s,
    ):
        (found,) = client.sessions()
        line = "(a run) on device 0, "
        assert line in described(found.id)
        weight = s.put(np.ones((100, 50), np.float32), name="fc1")
        gradient = s.zeros_like(weight)
        s.backward(
            s.forward(np.ones((2, 100), np.float32), weight).context,
            np.ones((2, 50), np.float32),
            into=gradient,
        )
        s.step(sdk.SGD(lr=0.1, momentum=0.9), {weight: gradient})
        about, heading, first, second = described(found.id).splitlines()
        assert about.startswith(f"{found.id} {line}")
        assert ": 1 steps, " in about
        assert heading.split()[:5] == ["number", "name", "role", "shape", "dtype"]
        row = f"{weight.number} fc1 weight 100 x 50 float32 39.1 KiB 1 momentum_buffer"
        assert first.split() == row.split()
        assert second.split()[1:3] == ["fc1.grad", "gradient"]
        told = json.loads(described(found.id, "--json"))
        assert told["tensors"][0]["shape"] == [100, 50]
        assert s.token not in described(found.id)
    done = gradwire("sessions", "describe", found.id, "--address", server.address)
    assert done.returncode == 1
    assert found.id in done.stderr
    assert "Traceback" not in done.stderr


def test_closing_an_unknown_session_names_it(server: ServerProcess) -> None:
    done = gradwire("sessions", "close", "session-x", "--address", server.address)
    assert done.returncode == 1
    assert "session-x" in done.stderr
    assert "Traceback" not in done.stderr
    # An unset variable of a script.
    done = gradwire("sessions", "close", "", "--address", server.address)
    assert (done.returncode, done.stdout) == (1, "")


def test_a_session_is_saved(tmp_path: Path) -> None:
    with (
        running_server(state_dir=str(tmp_path)) as server,
        sdk.connect(server.address) as client,
        client.session("1MiB") as s,
    ):
        s.put(np.ones((2, 3), np.float32), name="w")
        (found,) = client.sessions()
        done = gradwire("sessions", "save", found.id, "a", "--address", server.address)
        assert done.stdout == f"{found.id} is saved as a, after 0 steps\n"
        assert len(list(tmp_path.rglob("a.safetensors"))) == 1
        done = gradwire("sessions", "save", found.id, "/", "--address", server.address)
        assert done.returncode != 0
        assert "Traceback" not in done.stderr
        done = gradwire("sessions", "saved", "--address", server.address)
        heading, row = done.stdout.splitlines()
        assert heading.split() == ["name", "step", "size", "saved"]
        assert row.split()[:2] == ["a", "0"]
        done = gradwire("sessions", "delete", "a", "b", "--address", server.address)
        assert done.stdout == "a is deleted\n"
        assert done.returncode == 1
        assert "'b'" in done.stderr
        assert "Traceback" not in done.stderr
        assert client.saved_states() == []


def test_the_log_names_the_session_of_each_call() -> None:
    with (
        running_server() as server,
        sdk.connect(server.address) as client,
        client.session("1MiB") as s,
    ):
        weight = s.put(np.ones((2, 3), np.float32))
        s.forward(np.ones((4, 2), np.float32), weight)
        s.get(weight)
        (found,) = client.sessions()
        for verb in ("describe", "close"):
            done = gradwire("sessions", verb, found.id, "--address", server.address)
            assert done.returncode == 0, done.stderr
        server.wait_for_log("CloseSession")
        jobs = [each for each in server.records if each["message"] == "job"]
        named = {each["method"] for each in jobs if each.get("session") == found.id}
        others = {each["method"] for each in jobs} - named
        assert others == {"ListSessions"}
        methods = {"OpenSession", "PutTensor", "Compute", "GetTensor"}
        assert named == methods | {"DescribeSession", "CloseSession"}
        assert s.token not in server.logs


def test_a_directory_that_cannot_be_used_is_told_in_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    done = gradwire("serve", "--listen", "127.0.0.1:0", "--state-dir", str(file))
    assert done.returncode == 1
    assert str(file) in done.stderr
    assert "Traceback" not in done.stderr
