"""The memory and the processors that this process may use.

Containers, systemd (``MemoryMax=``, ``CPUQuota=``) and Slurm limit a process by its
control groups, which are nested: every group from the process's own up to the root
counts. See cgroups(7) and the kernel's documentation of cgroup v1 and v2.
"""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc/self")


def memory_bytes() -> int:
    """Memory that this process may take: of the machine, or less if it is limited."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    limits = [physical] if soft == resource.RLIM_INFINITY else [physical, soft]
    for group in _groups("memory"):
        # Version 2, and version 1. A server above memory.high is throttled.
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            text = _text(group / name)
            if text.isdigit():  # "max" without a limit
                limits.append(int(text))
    return min(limits)


def processors() -> int:
    """Processors that this process may use, at least 1.

    A quota of time is rounded up: 150 ms in each 100 ms count as 2.
    """
    limits = [len(os.sched_getaffinity(0))]
    for group in _groups("cpu"):
        quota, _, period = _text(group / "cpu.max").partition(" ")  # version 2
        if not quota:
            quota = _text(group / "cpu.cfs_quota_us")  # version 1
            period = _text(group / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):  # "max" or -1: no
            limits.append(math.ceil(int(quota) / int(period)))
    return max(1, min(limits))


def _groups(controller: str) -> Iterator[Path]:
    """Directories of the process's control groups, each followed by its parents."""
    paths = dict(_paths(controller))
    for line in _text(_PROC / "mountinfo").splitlines():
        # mountinfo, proc_pid_mountinfo(5): the root of the mount within its file
        # system, the mount point; after " - ", the type and the options.
        mount, _, rest = line.partition(" - ")
        root, point = (_unescaped(field) for field in mount.split(" ")[3:5])
        kind, _, options = rest.split(" ")[:3]
        if kind == "cgroup2":
            path = paths.get(2)
        elif kind == "cgroup" and controller in options.split(","):
            path = paths.get(1)
        else:
            continue
        if path is None:
            continue
        # In a container, the mount may show only the container's own group.
        try:
            inside = Path(path).relative_to(root)
        except ValueError:
            inside = Path()
        group = Path(point) / inside
        yield group
        for parent in group.parents:
            if not parent.is_relative_to(point):
                break
            yield parent


def _paths(controller: str) -> Iterator[tuple[int, str]]:
    """The version and the path of the process's group, for each hierarchy."""
    for line in _text(_PROC / "cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            yield 2, path
        elif controller in controllers.split(","):
            yield 1, path


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # no such controller here, or not readable
        return ""


def _unescaped(field: str) -> str:
    for code, sign in ("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\"):
        field = field.replace(code, sign)
    return field
