"""Which backend a server takes, and what it says of the one that it cannot."""

from __future__ import annotations

import importlib.machinery
import os
import subprocess
import sys

import pytest

from gradwire_server import BackendError, Settings
from gradwire_server.backends import select
from gradwire_server.backends.cuda import diagnose


class CudaError(RuntimeError):
    """As CuPy's own, which cannot be made without a CUDA library."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def lacking(status: int, text: str, driver: int = 0) -> str:
    def count() -> int:
        raise CudaError(status, text)

    why = diagnose.missing_device(count, lambda: driver, lambda: 13020)
    assert why is not None
    return why


NO_DRIVER = (35, "cudaErrorInsufficientDriver: CUDA driver version is insufficient")


def has_driver(monkeypatch: pytest.MonkeyPatch, found: bool) -> None:
    def load(name: str) -> None:
        assert name == "libcuda.so.1"
        if not found:
            raise OSError

    monkeypatch.setattr(diagnose.ctypes, "CDLL", load)


def test_a_host_without_a_driver_is_told_so(monkeypatch):
    has_driver(monkeypatch, found=False)
    assert "no NVIDIA driver" in lacking(*NO_DRIVER)


def test_a_driver_that_is_too_old_is_named_with_what_is_needed(monkeypatch):
    has_driver(monkeypatch, found=True)
    why = lacking(*NO_DRIVER, driver=12040)
    assert "driver is for CUDA 12.4" in why
    assert "needs 13.2" in why


@pytest.mark.parametrize("count", [lambda: 0, None])
def test_a_host_without_a_device_is_told_so(monkeypatch, count):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if count is None:
        why = lacking(100, "cudaErrorNoDevice: no CUDA-capable device is detected")
    else:
        why = diagnose.missing_device(count, lambda: 13020, lambda: 13020)
    assert why == "there is an NVIDIA driver, but no CUDA device"


def test_devices_that_were_hidden_are_why(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES=''" in lacking(100, "cudaErrorNoDevice")


def test_what_else_cuda_says_is_passed_on():
    why = lacking(802, "cudaErrorSystemNotReady: system not yet initialized")
    assert why == "CUDA says cudaErrorSystemNotReady: system not yet initialized"


def test_nothing_is_missing_where_a_device_answers():
    assert diagnose.missing_device(lambda: 1, lambda: 13020, lambda: 13020) is None


def without_cupy(name: str) -> importlib.machinery.ModuleSpec | None:
    return None if name == "cupy" else importlib.machinery.ModuleSpec(name, None)


def test_a_package_that_is_missing_is_named_with_how_to_get_it(monkeypatch):
    monkeypatch.setattr(diagnose, "find_spec", without_cupy)
    with pytest.raises(BackendError, match=r"CuPy is not installed \(pip install"):
        select.choose(Settings(backend="cupy"))


def test_auto_takes_numpy_then_and_says_why(monkeypatch):
    monkeypatch.setattr(diagnose, "find_spec", without_cupy)
    backend, why = select.choose(Settings(backend="auto"))
    backend.close()
    assert backend.name == "numpy"
    assert why.startswith("CuPy is not installed")


PROGRAM = """
from gradwire_server.backends.cuda.diagnose import missing
print(missing() or "nothing")
"""


def said(*options: str, **environment: str) -> str:
    """What is missing, by a process of its own."""
    done = subprocess.run(
        [sys.executable, *options, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, **environment},
    )
    return done.stdout


def test_a_cupy_that_cannot_be_imported_is_a_sentence(tmp_path):
    package = tmp_path / "cupy"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('half installed\\nhelp')")
    why = said(PYTHONPATH=str(tmp_path))
    assert "cannot be imported: half installed (pip install" in why


def test_the_real_cupy_says_that_there_is_no_driver():
    pytest.importorskip("cupy")
    why = said("-W", "error")
    if why == "nothing\n":
        pytest.skip("CUDA can be used here")
    assert "driver" in why


def test_no_cupy_is_imported_before_it_is_chosen():
    program = (
        "import sys, gradwire_server\n"
        "from gradwire_server import Settings\n"
        "from gradwire_server.backends import select\n"
        "select.choose(Settings(backend='numpy'))[0].close()\n"
        "print([name for name in sys.modules if name.startswith('cupy')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == "[]\n"
