"""Description of a run's machine and libraries, without host names."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

_PACKAGES = ("gradwire", "grpcio", "numpy", "protobuf", "pyarrow", "torch")


def describe(threads: int) -> dict[str, Any]:
    """The machine and software behind the figures."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return {
        "processor": _first("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release().split("-")[0],
        "python": platform.python_version(),
        "blas": f"{blas['name']} {blas['version']}",
        "blas_threads": threads,
        "packages": {name: v for name in _PACKAGES if (v := _version(name))},
        "load_before": round(os.getloadavg()[0], 2),
    }


class ProcessorTime:
    """The processors' time since this object was made, as the kernel counts it."""

    def __init__(self) -> None:
        self._before = _processor_ticks()

    def stolen(self) -> float:
        """Return the share that the host gave to other machines, from 0 to 1."""
        stolen, total = (
            after - before
            for after, before in zip(_processor_ticks(), self._before, strict=True)
        )
        return stolen / total if total else 0.0


def _processor_ticks() -> tuple[int, int]:
    """Ticks of all processors: stolen by the host, and in all; see proc(5)."""
    with Path("/proc/stat").open() as file:
        ticks = [int(part) for part in file.readline().split()[1:9]]
    return ticks[_STEAL], sum(ticks)


_STEAL = 7


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _first(path: str, key: str) -> str | None:
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None
