"""What the documentation's site generates is complete, and its check finds faults."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gradwire_cli.app import app
from gradwire_protocol.error_reasons import Reason
from scripts.docs_site import commands, contract, reasons

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"
CHECK = ROOT / "scripts" / "check-site"
BUF = shutil.which("buf", path=str(Path(sys.executable).parent)) or shutil.which("buf")


@pytest.mark.parametrize(
    "module", ["gradwire", "gradwire.torch", "gradwire.jax", "gradwire.ray"]
)
def test_every_public_name_of_the_sdk_is_in_the_reference_once(module: str) -> None:
    text = "".join(path.read_text() for path in REFERENCE.glob("*.md"))
    listed = re.findall(rf"^::: {re.escape(module)}\.(\w+)$", text, re.MULTILINE)
    source = (ROOT / "client" / module.replace(".", "/") / "__init__.py").read_text()
    public = re.search(r"^__all__ = \[(.*?)\]", source, re.MULTILINE | re.DOTALL)
    assert public is not None
    assert sorted(listed) == sorted(re.findall(r'"(\w+)"', public[1]))


@pytest.mark.skipif(BUF is None, reason="needs buf")
def test_the_contract_page_has_every_name_of_the_contract_with_its_comment() -> None:
    page = contract.markdown()
    plain = re.sub(r"(?<!\\)\[([^\[\]]+)\]\(#[^)]+\)", r"\1", page).replace("\\", "")
    words = " ".join(re.sub(r"```(?:text)?", "", plain).split())
    comments = 0
    for path in sorted((ROOT / "protos" / "gradwire" / "v1").glob("*.proto")):
        text = path.read_text()
        for name in re.findall(r"^(?:message|enum|service) (\w+)", text, re.MULTILINE):
            assert re.search(rf"^### (?:\w+ )?{name} {{", page, re.MULTILINE)
        for name in re.findall(r"^  rpc (\w+)", text, re.MULTILINE):
            assert f"\n#### {name} {{" in page
        for name, number in re.findall(
            r"^ +(?:[\w.<>, ]+ )?(\w+) = (\d+)(?: \[.*\])?;$", text, re.MULTILINE
        ):
            assert f"`{name}` = {number}" in page
        for block in re.findall(r"(?:^ *//(?: .*)?\n)+(?= *\w)", text, re.MULTILINE):
            comments += 1
            lines = [line.strip().removeprefix("//") for line in block.splitlines()]
            assert " ".join(" ".join(lines).split()) in words
    assert comments > 300


def test_the_command_page_has_every_command_with_its_usage() -> None:
    page = commands.markdown()
    listed = re.findall(r"^## gradwire (\w+)$", page, re.MULTILINE)
    assert listed == [name for name in app if not name.startswith("-")]
    for command in ("compute [X] [W] [DY] --out DIR", "token new", "sessions close"):
        assert f"```console\ngradwire {command}" in page
    assert "`--memory-limit SIZE`" in page


def test_the_table_of_reasons_has_each_of_them_once() -> None:
    table = reasons.markdown()
    rows = [line.strip("|").split("|") for line in table.splitlines()[2:]]
    answers = {
        name: (row[0].strip(), row[3].strip())
        for row in rows
        for name in re.findall(r"`([A-Z0-9_]+)`", row[1])
    }
    assert list(answers) == [str(reason) for reason in answers]
    assert sorted(answers) == sorted(str(reason) for reason in Reason)
    assert answers["DRAINING"] == ("UNAVAILABLE", "yes")
    assert answers["SHAPE_INVALID"] == ("INVALID_ARGUMENT", "no")
    assert answers["BUSY"][1].startswith("if the server gives a time")


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ('<a href="b.html#there">b</a>', None),
        ('<a href="c.html">c</a>', "links to c.html, which does not exist"),
        ('<a href="b.html#gone">b</a>', "b.html#gone, whose anchor does not exist"),
        ('<img src="gone.png">', "loads gone.png, which does not exist"),
        ('<script src="https://cdn.example/a.js"></script>', "loads https://cdn"),
        ('<link rel="stylesheet" href="//cdn.example/a.css">', "loads //cdn.example"),
        ('<a href="https://example.org/">elsewhere</a>', None),
    ],
)
def test_the_check_of_the_site_finds_broken_links_and_what_is_loaded_from_elsewhere(
    tmp_path: Path, body: str, fault: str | None
) -> None:
    (tmp_path / "a.html").write_text(body)
    (tmp_path / "b.html").write_text('<h2 id="there">b</h2>')
    done = subprocess.run(
        [sys.executable, CHECK, tmp_path],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode == 0) == (fault is None), done.stdout
    assert (fault or "") in done.stdout
