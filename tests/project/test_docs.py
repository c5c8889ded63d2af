"""The documentation is complete where it lists things, and links to what exists."""

from __future__ import annotations

import dataclasses
import re
import struct
from pathlib import Path

import pytest
import yaml

from gradwire_cli.terminal.logs import LogSettings
from gradwire_protocol.checksum import crc32c
from gradwire_protocol.data_plane.frames import (
    ATTACHED,
    Attach,
    Direction,
    FrameHeader,
    Kind,
)
from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.limits import MIB
from gradwire_protocol.matrices import Matrix
from gradwire_protocol.row_blocks import rows_of_a_block, segment_rows
from gradwire_server import Settings
from gradwire_server.backends.numpy.backend import NumpyBackend

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "bench").glob("*.md")),
    ROOT / "examples" / "clients" / "README.md",
]


def rows(page: str) -> list[list[str]]:
    """Cells of every row of the page's tables."""
    text = (ROOT / "docs" / page).read_text()
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]


def test_the_error_table_lists_every_reason_under_its_status():
    listed: dict[str, str] = {}
    status = ""
    for cells in rows("contract.md"):
        status = cells[0] or status
        for name in re.findall(r"[A-Z]+(?:_[A-Z0-9]+)*", cells[1]):
            listed.setdefault(name, status)
    actual = {str(reason): reason.status.name for reason in Reason}
    assert {name: listed.get(name) for name in actual} == actual


def test_the_examples_of_direct_connections_are_the_bytes_that_are_sent():
    text = (ROOT / "docs" / "contract.md").read_text()
    section = text.split("\n## Direct connections\n")[1].split("\n## ")[0]
    lines = r"(?:^ {4}(?:[0-9a-f]{2} +)+[0-9a-f]{2}\n)+"
    shown = [bytes.fromhex(b) for b in re.findall(lines, section, re.MULTILINE)]
    payload = struct.pack("<4f", 1, 2, 3, 4)
    elements = FrameHeader(Kind.ELEMENTS, Matrix.X, 4096, len(payload), crc32c(payload))
    assert shown == [
        Attach(Direction.DOWN, 1, bytes(range(32))).encode(),
        ATTACHED,
        elements.encode() + payload,
        FrameHeader(Kind.COMPLETE, 0, 10_000).encode(),
    ]


def test_every_setting_is_listed_with_its_variable():
    fields = [*dataclasses.fields(Settings), *dataclasses.fields(LogSettings)]
    listed = {
        cells[0].strip("`"): cells[1].strip("`") for cells in rows("operating.md")
    }
    for field in fields:
        flag = field.name.replace("_", "-")
        assert listed.get(flag) == f"GRADWIRE_{field.name.upper()}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files_of_the_repository(page):
    """The build of the site checks the rest: anchors, and that every page is found."""
    for target in re.findall(r"\]\(([^)\s#]+)", page.read_text()):
        assert "://" in target or (page.parent / target).is_file(), target


def test_the_page_about_deploying_names_files_and_targets_that_exist():
    text = (ROOT / "docs" / "deploying.md").read_text()
    files = set(re.findall(r"deploy/[\w./-]*\w", text))
    assert len(files) > 5
    assert not {path for path in files if not (ROOT / path).exists()}
    targets = re.findall(r"`make ([\w-]+)`", text)
    makefile = (ROOT / "Makefile").read_text()
    assert targets
    assert all(f"\n{target}:" in makefile for target in targets)


def test_the_page_about_deploying_names_every_component_and_profile():
    text = (ROOT / "docs" / "deploying.md").read_text()
    kubernetes = ROOT / "deploy" / "kubernetes"
    for folder in [*kubernetes.glob("components/*"), *kubernetes.glob("overlays/*")]:
        assert f"`{folder.name}`" in text
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    profiles = {p for s in compose["services"].values() for p in s.get("profiles", ())}
    for profile in profiles - {"check"}:
        assert f"--profile {profile} " in text


def test_the_commands_for_kubernetes_make_the_secrets_that_pods_mount():
    text = (ROOT / "docs" / "deploying.md").read_text()
    made = set(re.findall(r"create secret \w+ ([\w-]+)", text))
    base = (ROOT / "deploy" / "kubernetes" / "base" / "deployment.yaml").read_text()
    pod = yaml.safe_load(base)["spec"]["template"]["spec"]
    mounted = {v["secret"]["secretName"] for v in pod["volumes"] if "secret" in v}
    assert made == mounted


def test_the_page_about_spread_has_the_sizes_of_segments():
    text = (ROOT / "docs" / "spread.md").read_text()
    table = text.partition("| dtype, sum |")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(table) > 8
    dtype = accumulator = Dtype.FLOAT32
    for line in table:
        kinds, *columns = (cell.strip() for cell in line.strip("|").split("|"))
        if kinds:
            dtype, accumulator = map(Dtype.named, kinds.split(", "))
        n, *sizes = (int(cell.replace(",", "")) for cell in columns[:4])
        b = rows_of_a_block(n, n, dtype.itemsize, NumpyBackend.row_block_bytes)
        s = segment_rows(n, n, dtype.itemsize, accumulator.itemsize, b)
        assert sizes == [b, s // b, s], line
        operands = s * 2 * n * dtype.itemsize
        number, unit = columns[4].split()
        assert int(number) * {"MiB": MIB, "GiB": 1024 * MIB}[unit] == operands
        of_w, of_sum = (float(part.rstrip(" %")) for part in columns[5].split("+"))
        assert of_w == pytest.approx(50 * n * n * dtype.itemsize / operands, abs=0.06)
        assert of_sum == pytest.approx(
            50 * n * n * accumulator.itemsize / operands, abs=0.06
        )
