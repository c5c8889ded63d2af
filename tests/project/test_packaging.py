"""What pyproject.toml promises to whoever installs gradwire."""

from __future__ import annotations

import importlib
import re
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
STUBS = ROOT / "protos" / "gradwire_protocol" / "v1"
PUBLIC = ROOT / "client" / "gradwire" / "v1"
PROTOS = ROOT / "protos" / "gradwire" / "v1"


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def floor(requirements: list[str], name: str) -> Version:
    (specifier,) = (
        requirement.specifier
        for requirement in map(Requirement, requirements)
        if requirement.name == name
    )
    (bound,) = (bound.version for bound in specifier if bound.operator in {">=", "=="})
    return Version(bound)


def stamp(pattern: str, files: str) -> Version:
    """The newest version that a pattern finds in the generated files."""
    found = [
        Version(match)
        for path in STUBS.glob(files)
        for match in re.findall(pattern, path.read_text())
    ]
    assert found, f"no stamp in {files}"
    return max(found)


def test_the_oldest_protobuf_that_is_admitted_runs_the_stubs(
    pyproject: dict[str, Any],
) -> None:
    needed = stamp(r"# Protobuf Python Version: (\S+)", "*_pb2.py")
    assert floor(pyproject["project"]["dependencies"], "protobuf") >= needed


def test_the_oldest_grpcio_that_is_admitted_runs_the_stubs(
    pyproject: dict[str, Any],
) -> None:
    needed = stamp(r"GRPC_GENERATED_VERSION = '(\S+)'", "*_pb2_grpc.py")
    assert floor(pyproject["project"]["dependencies"], "grpcio") >= needed


def test_stubs_are_generated_by_the_oldest_grpcio_that_is_admitted(
    pyproject: dict[str, Any],
) -> None:
    generator = floor(pyproject["dependency-groups"]["protos"], "grpcio-tools")
    assert generator == floor(pyproject["project"]["dependencies"], "grpcio")


@pytest.mark.parametrize(
    "companion", ["grpcio-channelz", "grpcio-health-checking", "grpcio-reflection"]
)
def test_the_standard_services_are_as_old_as_grpcio(
    pyproject: dict[str, Any], companion: str
) -> None:
    extra = pyproject["project"]["optional-dependencies"]["server"]
    expected = floor(pyproject["project"]["dependencies"], "grpcio")
    assert floor(extra, companion) == expected


def test_the_generated_package_holds_generated_code_alone() -> None:
    names = {path.stem for path in PROTOS.glob("*.proto")}
    expected = {f"{name}_pb2.py" for name in names}
    expected |= {f"{name}_pb2.pyi" for name in names}
    expected |= {"gradient_service_pb2_grpc.py", "session_service_pb2_grpc.py"}
    found = {path.name for path in STUBS.iterdir() if path.is_file()}
    assert found == expected | {"__init__.py"}


def test_every_generated_module_has_its_public_name() -> None:
    generated = {path.name for path in STUBS.glob("*.py")}
    assert {path.name for path in PUBLIC.glob("*.py")} == generated
    for name in (name.removesuffix(".py") for name in generated - {"__init__.py"}):
        public = importlib.import_module(f"gradwire.v1.{name}")
        module = importlib.import_module(f"gradwire_protocol.v1.{name}")
        names = {name for name in vars(module) if not name.startswith("_")}
        assert all(getattr(public, name) is getattr(module, name) for name in names)


@pytest.mark.parametrize(
    "option", ["csharp_namespace", "go_package", "java_multiple_files", "java_package"]
)
def test_the_contract_says_what_generated_code_is_called(option: str) -> None:
    for path in PROTOS.glob("*.proto"):
        assert f"\noption {option} = " in path.read_text(), path


def test_no_extra_brings_a_deep_learning_framework(pyproject: dict[str, Any]) -> None:
    project = pyproject["project"]
    everything = [*project["dependencies"]]
    for extra in ("cli", "server"):
        everything += project["optional-dependencies"][extra]
    names = {Requirement(requirement).name for requirement in everything}
    assert not names & {"torch", "jax", "jaxlib", "tensorflow", "cupy"}


def test_each_cuda_is_an_extra_of_its_own_with_its_libraries(
    pyproject: dict[str, Any],
) -> None:
    """The two builds of CuPy are one package to Python: they exclude each other."""
    extras = pyproject["project"]["optional-dependencies"]
    for extra, package in (("cuda12", "cupy-cuda12x"), ("cuda13", "cupy-cuda13x")):
        (requirement,) = map(Requirement, extras[extra])
        assert (requirement.name, requirement.extras) == (package, {"ctk"})
    others = [Requirement(r) for name in ("cli", "server") for r in extras[name]]
    assert not [r for r in others if r.name.startswith("cupy")]
    assert all(r.extras == {"cli"} for r in others if r.name == "gradwire")


def test_the_installed_version_is_the_one_that_the_project_states(
    pyproject: dict[str, Any],
) -> None:
    assert metadata.version("gradwire") == pyproject["project"]["version"]


def test_the_changelog_has_a_place_for_what_is_not_released_yet() -> None:
    headings = re.findall(
        r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE
    )
    assert headings[0] == "Unreleased"
