"""Certificates for a trial, from `gradwire certs` to a job over TLS."""

from __future__ import annotations

import shlex
import stat
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradwire as sdk
from gradwire_cli.app import run
from gradwire_cli.checks.checks import run_checks
from gradwire_cli.commands import check
from tests.cli.conftest import gradwire, refusal_here, sentence, started
from tests.cli.test_serve import addresses

KEYS = ("ca-key.pem", "server-key.pem", "client-key.pem")
CERTS = ("ca.pem", "server.pem", "client.pem")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A directory of certificates, and what was said of it."""
    directory = tmp_path_factory.mktemp("trial") / "of mine"
    done = gradwire("certs", directory, "--host", "gpu-node", "--host", "10.1.2.3")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return directory, done.stdout


@pytest.fixture(scope="module")
def server(made: tuple[Path, str]) -> Iterator[str]:
    """A server that was started as that text says, but on a port of its own."""
    command = next(
        block for block in made[1].split("\n\n") if "gradwire serve" in block
    )
    flags = shlex.split(command.replace("\\\n", " "))[2:]
    flags[flags.index("--listen") + 1] = "127.0.0.1:0"
    with started("serve", *flags) as process:
        yield addresses(process)[0]


def as_client(directory: Path) -> list[str]:
    return [
        f"--tls-ca={directory / 'ca.pem'}",
        f"--tls-cert={directory / 'client.pem'}",
        f"--tls-key={directory / 'client-key.pem'}",
    ]


def test_private_keys_are_their_owners_alone(made: tuple[Path, str]) -> None:
    directory, _ = made
    assert {path.name for path in directory.iterdir()} == {*KEYS, *CERTS}
    for name in KEYS:
        assert stat.S_IMODE((directory / name).stat().st_mode) == 0o600


def test_what_is_there_stays_and_nothing_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "client-key.pem"
    taken.write_text("of somebody")
    assert f"1 gradwire: {taken} exists already" in refusal_here(
        capsys, "certs", tmp_path
    )
    assert [path.name for path in tmp_path.iterdir()] == ["client-key.pem"]
    assert taken.read_text() == "of somebody"
    assert "cannot be written" in refusal_here(capsys, "certs", taken / "below")


def test_names_that_no_certificate_can_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, text in (
        (
            ["--host", "gpu-node:50051"],
            "host is 'gpu-node:50051': expected a host",
        ),
        (["--host", "http://gpu"], "host is 'http://gpu': expected a host name"),
        (["--client", ""], "client has 0 characters"),
        (["--client", "a\nb"], "client is 'a\\nb': expected printable characters"),
        (["--days", "0"], "--days"),
    ):
        refusal = refusal_here(capsys, "certs", tmp_path / "none", *flags)
        assert refusal.startswith("2 gradwire: ")
        assert text in refusal
    assert not (tmp_path / "none").exists()


def test_the_text_for_python_connects(made: tuple[Path, str], server: str) -> None:
    directory, text = made
    (call,) = (block for block in text.split("\n\n") if "gradwire.connect" in block)
    assert "'gpu-node:50051'" in call
    with eval(
        call.strip().replace("gpu-node:50051", server), {"gradwire": sdk}
    ) as client:
        assert client.forward(np.ones((2, 3)), np.ones((3, 1))).sum() == 6
    for name in ("gpu-node", "10.1.2.3", "localhost"):
        tls = sdk.Tls(
            ca=directory / "ca.pem",
            cert=directory / "client.pem",
            key=directory / "client-key.pem",
            server_name=name,
        )
        sdk.connect(server, tls=tls).close()


@pytest.mark.parametrize("command", ["check", "info", "health", "compute"])
def test_every_command_speaks_tls(
    made: tuple[Path, str],
    server: str,
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = partial(run_checks, names={"products", "call = stream", "call = direct"})
    monkeypatch.setattr(check, "run_checks", few)
    arguments: list[Any] = [command, "--address", server]
    if command == "compute":
        np.save(tmp_path / "x.npy", np.ones((4, 3), np.float32))
        np.save(tmp_path / "w.npy", np.ones((3, 2), np.float32))
        arguments += [tmp_path / "x.npy", tmp_path / "w.npy", "--out", tmp_path]
    assert run([*map(str, arguments), *as_client(made[0])]) == 0
    if command == "compute":
        assert (np.load(tmp_path / "y.npy") == 3).all()


def test_variables_do_for_flags(
    made: tuple[Path, str],
    server: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory, _ = made
    for name, file in (("CA", "ca"), ("CERT", "client"), ("KEY", "client-key")):
        path = str(directory / f"{file}.pem")
        monkeypatch.setenv(f"GRADWIRE_CONNECT_TLS_{name}", path)
    # Those of a server beside it are not for it.
    monkeypatch.setenv("GRADWIRE_TLS_CERT", "/server/s")
    monkeypatch.setenv("GRADWIRE_TLS_KEY", "/server/s")
    monkeypatch.setenv("GRADWIRE_ADDRESS", server)
    assert run(["health"]) == 0
    assert "accepts jobs" in capsys.readouterr().out
    monkeypatch.setenv("GRADWIRE_CONNECT_TLS_SERVER_NAME", "gpu.example")
    assert "is not for gpu.example" in refusal_here(capsys, "health")


def test_what_is_wrong_is_one_sentence(
    made: tuple[Path, str], server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, _ = made
    for flags, text in (
        ([], "it expects TLS"),
        (["--tls"], "is not trusted"),
        ([f"--tls-ca={directory / 'ca.pem'}"], "it requires a client certificate"),
        (["--tls-ca=/none"], "tls.ca (/none) cannot be read: No such file"),
    ):
        refusal = refusal_here(capsys, "info", "--address", server, *flags)
        assert refusal.startswith("1 gradwire: ")
        assert text in refusal
    # gRPC writes past Python, and has nothing to add.
    assert "is not trusted" in sentence(gradwire("info", "--address", server, "--tls"))


def test_a_command_with_a_server_of_its_own_needs_no_tls(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv("GRADWIRE_ADDRESS", raising=False)
    monkeypatch.setenv("GRADWIRE_CONNECT_TLS", "true")
    np.save(tmp_path / "x.npy", np.ones((4, 3), np.float32))
    np.save(tmp_path / "w.npy", np.ones((3, 2), np.float32))
    files = [str(tmp_path / name) for name in ("x.npy", "w.npy")]
    assert run(["compute", *files, "--out", str(tmp_path), "--quiet"]) == 0
