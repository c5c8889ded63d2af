"""What the images install is what pyproject.toml asks for, to the hash."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
CONTAINERS = ROOT / "deploy" / "containers"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
MEND = "run `make lock-containers`"

LOCKS = {
    "cpu": ("server", "otel"),
    "cuda12": ("server", "otel", "cuda12"),
    "cuda13": ("server", "otel", "cuda13"),
}
"""The extras that each image has."""


def wanted(extras: tuple[str, ...]) -> dict[str, Requirement]:
    """The requirements of the project with these extras, by name."""
    found: dict[str, Requirement] = {}
    lists = [PYPROJECT["project"]["dependencies"], *(EXTRAS[extra] for extra in extras)]
    for requirement in (Requirement(text) for texts in lists for text in texts):
        if requirement.name == "gradwire":
            found |= wanted(tuple(requirement.extras))
        else:
            found[canonicalize_name(requirement.name)] = requirement
    return found


def entries(lock: str) -> list[tuple[Requirement, str]]:
    """Each requirement of a lock, and the lines below it: hashes and who wants it."""
    text = (CONTAINERS / f"{lock}.lock").read_text()
    parts = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]
    lines = [part.partition("\n") for part in parts]
    return [(Requirement(first.rstrip(" \\")), rest) for first, _, rest in lines]


@pytest.mark.parametrize(("lock", "extras"), LOCKS.items(), ids=LOCKS)
def test_a_lock_is_in_step_with_the_project(lock: str, extras: tuple[str, ...]) -> None:
    direct = {
        canonicalize_name(pin.name)
        for pin, rest in entries(lock)
        if "gradwire (pyproject.toml)" in rest
    }
    requirements = wanted(extras)
    assert direct == requirements.keys(), MEND
    for pin, _ in entries(lock):
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        requirement = requirements.get(canonicalize_name(pin.name))
        if requirement is not None:
            assert requirement.specifier.contains(Version(specifier.version)), MEND


@pytest.mark.parametrize("lock", [*LOCKS, "build"])
def test_everything_that_is_locked_has_a_hash(lock: str) -> None:
    assert entries(lock)
    for pin, rest in entries(lock):
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", rest), pin.name


def test_what_builds_the_image_is_in_step_with_the_project() -> None:
    listed = {
        requirement.name: requirement
        for requirement in map(
            Requirement,
            re.findall(
                r"^[a-z].*", (CONTAINERS / "build.in").read_text(), re.MULTILINE
            ),
        )
    }
    for text in PYPROJECT["build-system"]["requires"]:
        assert str(listed[Requirement(text).name]) == text
    pins = {pin.name: pin for pin, _ in entries("build")}
    for name, requirement in listed.items():
        (specifier,) = pins[name].specifier
        assert requirement.specifier.contains(Version(specifier.version)), MEND


def test_images_are_labelled_with_the_version_of_the_project() -> None:
    versions = re.findall(
        r"^ARG VERSION=(.+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE
    )
    assert len(versions) == 2
    assert set(versions) == {PYPROJECT["project"]["version"]}


def test_the_images_are_built_of_every_package_of_the_wheel() -> None:
    packages = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    folders = {package.partition("/")[0] for package in packages}
    copied = re.findall(
        r"^COPY (\w+) \1$", (ROOT / "Dockerfile").read_text(), re.MULTILINE
    )
    assert set(copied) == folders
    allowed = (ROOT / ".dockerignore").read_text().split()
    assert {f"!{folder}" for folder in folders} <= set(allowed)
