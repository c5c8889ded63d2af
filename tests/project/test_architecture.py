"""The page about the architecture names every folder, layer and file as it is."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()

PACKAGES = (
    ROOT / "protos" / "gradwire_protocol",
    ROOT / "client" / "gradwire",
    ROOT / "cluster" / "gradwire_ray",
    ROOT / "server" / "gradwire_server",
    ROOT / "cli" / "gradwire_cli",
)
IMPORT_ROOTS = (ROOT, *(package.parent for package in PACKAGES))


def section(heading: str) -> str:
    """The text below a heading, up to the next one."""
    return PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def named_folders() -> set[Path]:
    """The folders of the tree, whose indentation says what they are in."""
    folders = set()
    above: list[Path] = []
    for indent, name in re.findall(r"^    ( *)(\S+)/(?: |$)", PAGE, re.MULTILINE):
        del above[len(indent) // 2 :]
        above.append((above[-1] if above else ROOT) / name)
        folders.add(above[-1])
    return folders


def folders_with_code(top: Path) -> set[Path]:
    return {path.parent for path in top.rglob("*.py")}


def test_every_folder_of_the_tree_exists() -> None:
    assert len(named_folders()) > 40
    missing = {path for path in named_folders() if not path.is_dir()}
    assert not missing


def test_every_folder_of_a_package_is_in_the_tree() -> None:
    existing = set().union(*map(folders_with_code, PACKAGES))
    assert existing <= named_folders()


def test_every_folder_of_tests_and_of_the_bench_is_in_the_tree() -> None:
    tops = (ROOT / "tests", ROOT / "bench")
    existing = {
        path
        for path in set().union(*map(folders_with_code, tops))
        if path.parent in tops
    }
    assert existing <= named_folders()


def listed_layers() -> dict[str, list[set[str]]]:
    """The layers of each package, from the block below the tree."""
    block = section("Folders").rstrip().rpartition("\n\n")[2]
    texts: list[tuple[str, list[str]]] = []
    for line in block.splitlines():
        first, *others = line.split()
        if line[4] == " ":  # a line that goes on
            texts[-1][1].extend((first, *others))
        else:
            texts.append((first, others))
    return {
        name: [set(layer.split(", ")) for layer in " ".join(words).split(" → ")]
        for name, words in texts
    }


def test_layers_are_those_that_import_linter_checks() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    checked = {
        contract.get("containers", ["packages"])[0]: [
            set(layer.split(" | ")) for layer in contract["layers"]
        ]
        for contract in pyproject["tool"]["importlinter"]["contracts"]
        if contract["type"] == "layers"
    }
    assert listed_layers() == checked


def test_every_file_of_the_table_exists() -> None:
    table = section("Where do I add …")
    named = set(re.findall(r"`((?:\w+/)+(?:\w+\.\w+)?|\w+\.(?:md|toml))`", table))
    assert len(named) > 50
    missing = {
        path
        for path in named
        if not any((root / path).exists() for root in IMPORT_ROOTS)
    }
    assert missing == {"gradwire_cli/commands/NAME.py"}
