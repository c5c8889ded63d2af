"""Files of saved states, where no client can tell them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradwire_protocol.optimizers import FORMULAS
from gradwire_server.errors import JobError
from gradwire_server.sessions import state_files
from gradwire_server.sessions.state_contents import Snapshot
from gradwire_server.sessions.state_files import StateFiles


def state(step: int) -> Snapshot:
    about = {"formulas": FORMULAS, "step": str(step)}
    return Snapshot(step, {}, about | {"tensors": "{}", "gradients": "[]"})


def test_only_states_that_have_changed_are_read_to_be_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    really: Callable[..., object] = state_files._read

    def counted(descriptor: int, fail: Callable[..., object]) -> object:
        read.append(descriptor)
        return really(descriptor, fail)

    monkeypatch.setattr(state_files, "_read", counted)
    files = StateFiles(tmp_path)

    def listed() -> dict[str, int]:
        return {each.name: each.step for each in files.list("alice")}

    access: Any = None  # to elements, which these have none of
    for name, step in (("a", 1), ("b", 2)):
        files.save("alice", name, state(step), access)
    assert [listed() for _ in range(3)] == [{"a": 1, "b": 2}] * 3
    assert len(read) == 2
    files.save("alice", "a", state(3), access)
    assert [listed() for _ in range(3)] == [{"a": 3, "b": 2}] * 3
    assert len(read) == 3
    files.delete("alice", "b")
    assert listed() == {"a": 3}
    assert not files.list("bob")


def test_a_link_is_refused_as_what_it_is(tmp_path: Path) -> None:
    files = StateFiles(tmp_path)
    access: Any = None
    files.save("alice", "a", state(1), access)
    (file,) = tmp_path.rglob("a.safetensors")
    file.with_name("b.safetensors").symlink_to(file)
    with pytest.raises(JobError, match="'b' is a symbolic link"):
        files.open("alice", "b")
