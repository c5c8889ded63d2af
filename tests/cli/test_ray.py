"""``gradwire ray`` where there is no Ray, or no cluster."""

from __future__ import annotations

import sys

import pytest

from tests.cli.conftest import refusal_here


@pytest.mark.parametrize("command", ["up", "status", "down"])
def test_without_ray_a_sentence_says_what_to_install(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("gradwire_ray.actors", "gradwire_ray.control"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install 'gradwire[server,ray]'" in refusal_here(capsys, "ray", command)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--nodes", "0"), "2 gradwire: --nodes is 0: expected at least 1"),
        (("--max-nodes", "2"), "2 gradwire: --max-nodes is set without nodes"),
        (("--", "--max-jobs", "0"), "2 gradwire: max_jobs is 0: expected at least 1"),
        (("--", "--max-job", "2"), "2 gradwire: unknown option: --max-job"),
        (("--", "--listen", "0.0.0.0:1"), "--port"),
    ],
)
def test_wrong_flags_are_refused_before_anything_starts(
    flags: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert text in refusal_here(capsys, "ray", "up", *flags)
