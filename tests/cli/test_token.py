"""`gradwire token`: tokens that a server takes, and a file that has none."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import numpy as np
import pytest

from gradwire_cli.app import run
from gradwire_server import Settings, start_in_thread
from gradwire_server.auth.tokens import parse_tokens
from tests.cli.conftest import refusal_here


def out_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run(["token", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_a_token_is_printed_once_and_its_hash_is_added_to_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tokens.toml"
    made = {}
    for tenant in ("alice", "bob"):
        token = out_of(capsys, "new", tenant, "--file", file).removesuffix("\n")
        assert re.fullmatch("gw_[A-Za-z0-9_-]{43}", token)
        made[tenant] = token
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    known = parse_tokens(file.read_bytes())
    assert {tenant: known.tenant_of(made[tenant]) for tenant in made} == {
        "alice": "alice",
        "bob": "bob",
    }
    listed = out_of(capsys, "list", "--file", file)
    for entry in known:
        assert re.search(rf"{entry.id} +{entry.tenant} +{entry.created}", listed)
    assert not any(token in listed + file.read_text() for token in made.values())
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.toml"]


def test_tenants_are_listed_as_they_are_called(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though what prints the list knows brackets as marks of its own."""
    file = tmp_path / "tokens.toml"
    for tenant in ("[red]alice", "[/bob]"):
        out_of(capsys, "new", tenant, "--file", file)
    listed = out_of(capsys, "list", "--file", file)
    assert "[red]alice " in listed
    assert "[/bob] " in listed


def test_a_token_that_is_revoked_is_good_no_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tokens.toml"
    file.touch(0o640)
    alice, bob = (
        out_of(capsys, "new", tenant, "--file", file).strip()
        for tenant in ("alice", "bob")
    )
    (entry, _) = parse_tokens(file.read_bytes())
    out_of(capsys, "revoke", entry.id, "--file", file)
    known = parse_tokens(file.read_bytes())
    assert (known.tenant_of(alice), known.tenant_of(bob)) == (None, "bob")
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_without_a_file_the_lines_to_add_are_printed_beside_the_token(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["token", "new", "alice"]) == 0
    out, err = capsys.readouterr()
    known = parse_tokens(err[err.index("[[tokens]]") :].encode())
    assert known.tenant_of(out.strip()) == "alice"


def test_what_cannot_be_done_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tokens.toml"
    assert "No such file" in refusal_here(capsys, "token", "list", "--file", file)
    assert "is no name" in refusal_here(capsys, "token", "new", "", "--file", file)
    nowhere = tmp_path / "nowhere" / "tokens.toml"
    refused = refusal_here(capsys, "token", "new", "alice", "--file", nowhere)
    assert f"{nowhere} cannot be written" in refused
    file.write_text("")
    refused = refusal_here(capsys, "token", "revoke", "abc", "--file", file)
    assert "no section [[tokens]] for the token abc" in refused
    file.write_text("tokens = 1")
    for command in (["new", "alice"], ["list"], ["revoke", "abc"]):
        refused = refusal_here(capsys, "token", *command, "--file", file)
        assert "is not a tokens file: tokens is no list" in refused
    assert file.read_text() == "tokens = 1"


def test_commands_send_the_token_of_a_file_or_of_the_environment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("GRADWIRE_")]:
        monkeypatch.delenv(name)
    tokens = tmp_path / "tokens.toml"
    mine = tmp_path / "mine"
    mine.write_text(out_of(capsys, "new", "alice", "--file", tokens))
    x, w = tmp_path / "x.npy", tmp_path / "w.npy"
    np.save(x, np.ones((3, 2)))
    np.save(w, np.ones((2, 4)))
    settings = Settings(
        listen=("127.0.0.1:0",), backend="numpy", auth_tokens=tokens, auth_health=True
    )
    with start_in_thread(settings) as server:
        (address,) = server.addresses
        commands = (
            ["info"],
            ["health"],
            ["sessions", "list"],
            ["compute", "--x", x, "--w", w, "--out", tmp_path / "out", "--force"],
        )
        for command in commands:
            asked = [*map(str, command), "--address", address]
            refused = refusal_here(capsys, *asked)
            assert "asks for credentials" in refused
            assert "; --token-file, or the variable GRADWIRE_TOKEN, gives" in refused
            assert run([*asked, "--token-file", str(mine)]) == 0
            monkeypatch.setenv("GRADWIRE_TOKEN", mine.read_text())
            assert run(asked) == 0
            monkeypatch.delenv("GRADWIRE_TOKEN")
            capsys.readouterr()
        nothing = str(tmp_path / "nothing")
        refused = refusal_here(
            capsys, "info", "--address", address, "--token-file", nothing
        )
        assert f"the token file {nothing} cannot be read: No such file" in refused
    refused = refusal_here(
        capsys, "info", "--address", "gpu-node:1", "--token-file", mine
    )
    assert "would be sent to gpu-node:1 in plaintext" in refused
    assert mine.read_text().strip() not in refused
