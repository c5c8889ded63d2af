"""Backends of other packages: found by name, and told of in one sentence."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import numpy as np
import pytest

import gradwire as sdk
from gradwire_server import BackendError, Settings, backend_names
from gradwire_server.backends import registry, select
from tests.cli.conftest import gradwire, sentence, started

ROOT = Path(__file__).parents[3]

TINY = """
from dataclasses import replace

from gradwire_server.backends.numpy.backend import NumpyBackend


class TinyBackend(NumpyBackend):
    name = "tiny"

    def __init__(self):
        super().__init__()
        device = replace(self.devices[0], backend=self.name, name="an abacus")
        self.devices = (device,)


def make_backend(settings):
    return TinyBackend()
"""


def installed(directory: Path, name: str, value: str, package: str = "pkg") -> None:
    """What pip leaves behind of a package that has one entry point."""
    info = directory / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
    )
    (info / "entry_points.txt").write_text(
        f"[{backend_names.GROUP}]\n{name} = {value}\n"
    )


def with_path(directory: Path) -> dict[str, str]:
    before = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(directory), before)))}


def test_a_package_with_an_entry_point_is_all_that_a_backend_needs(
    tmp_path: Path,
) -> None:
    (tmp_path / "tiny_backend.py").write_text(TINY)
    installed(tmp_path, "tiny", "tiny_backend:make_backend")
    with started(
        *("serve", "--backend", "tiny", "--listen", "127.0.0.1:0"),
        env=with_path(tmp_path),
    ) as process:
        assert process.stdout is not None
        ready = process.stdout.readline()
        assert ready.endswith("(tiny: as asked)\n")
        address = ready.split(" serves on ")[1].split(" (")[0]
        with sdk.connect(address) as client:
            x, w = np.ones((2, 3), np.float32), np.ones((3, 4), np.float32)
            result = client.gradients(x, w, np.ones((2, 4), np.float32), verify=True)
            (device,) = client.server_info().devices
    assert (result.dw == 2).all()
    assert (device.backend, device.name) == ("tiny", "an abacus")
    assert result.receipt.device == device


def test_an_unknown_name_is_told_with_those_that_there_are(tmp_path: Path) -> None:
    installed(tmp_path, "tiny", "tiny_backend:make_backend")
    done = gradwire("serve", "--backend", "tinny", env=with_path(tmp_path))
    assert done.returncode == 2
    text = "backend is 'tinny': expected one of auto, cupy, numpy, tiny"
    assert text in sentence(done)


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (None, "No module named 'tiny_backend'"),
        ("import a_library_that_is_missing", "'a_library_that_is_missing'"),
        ("raise RuntimeError('half installed\\nhelp')", "half installed"),
        ("", "has no attribute 'make_backend'"),
    ],
)
def test_one_that_cannot_be_imported_is_told_in_a_sentence(
    tmp_path: Path, code: str | None, why: str
) -> None:
    if code is not None:
        (tmp_path / "tiny_backend.py").write_text(code)
    installed(tmp_path, "tiny", "tiny_backend:make_backend")
    done = gradwire(
        *("serve", "--backend", "tiny", "--listen", "127.0.0.1:0"),
        env=with_path(tmp_path),
    )
    assert done.returncode == 1
    said = sentence(done)
    assert said.startswith(
        "the backend tiny cannot be used: its plug-in tiny_backend:make_backend "
        "cannot be imported: "
    )
    assert said.endswith(why)


def test_one_whose_library_is_missing_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Imported as late as it should be: when the backend is made."""
    (tmp_path / "late_backend.py").write_text(
        "def make_backend(settings):\n    import a_library_that_is_missing\n"
    )
    installed(tmp_path, "late", "late_backend:make_backend")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        BackendError,
        match=r"^the backend late cannot be used: No module named 'a_library_that_",
    ):
        select.choose(Settings(backend="late"))


def test_nobody_takes_the_name_of_a_backend_of_gradwires_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(tmp_path, "numpy", "other:make_backend")
    monkeypatch.syspath_prepend(tmp_path)
    backend, _ = select.choose(Settings(backend="numpy"))
    backend.close()
    assert type(backend).__module__ == "gradwire_server.backends.numpy.backend"


def test_two_packages_with_one_name_are_told_apart_by_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("one", "other"):
        installed(tmp_path, "tiny", f"{package}:make_backend", package)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BackendError, match="one:make_backend and other:make_backend"):
        registry.load("tiny")


def test_a_checkout_has_the_entry_points_that_the_package_declares() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"][backend_names.GROUP] == backend_names.OWN
