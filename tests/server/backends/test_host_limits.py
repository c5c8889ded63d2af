"""What a process may use: of the machine, or of its control groups."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gradwire_server.backends import host_limits

GIB = 1 << 30
MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
CORES = len(os.sched_getaffinity(0))


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree with /proc/self and a mount point, that tests fill."""
    (tmp_path / "proc").mkdir()
    monkeypatch.setattr(host_limits, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    return tmp_path


def mount(files: Path, kind: str, options: str, root: str = "/") -> Path:
    point = files / f"mnt {kind} {options}"
    point.mkdir()
    line = f"35 31 0:32 {root} {str(point).replace(' ', chr(92) + '040')} rw shared:9"
    with (files / "proc" / "mountinfo").open("a") as info:
        info.write(f"{line} - {kind} cgroup rw,{options}\n")
    return point


def group(files: Path, line: str) -> None:
    with (files / "proc" / "cgroup").open("a") as groups:
        groups.write(f"{line}\n")


def limit(directory: Path, **texts: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        # memory_max is the file memory.max
        (directory / name.replace("_", ".", 1)).write_text(f"{text}\n")


def test_without_groups_it_is_the_machines(files):
    assert host_limits.memory_bytes() == MACHINE
    assert host_limits.processors() == 64


@pytest.mark.parametrize("below", ["", "system.slice", "system.slice/gradwire.service"])
def test_version_2_the_narrowest_of_the_group_and_its_parents_holds(files, below):
    top = mount(files, "cgroup2", "nsdelegate")
    group(files, "0::/system.slice/gradwire.service")
    service = top / "system.slice" / "gradwire.service"
    limit(service, memory_max="max", cpu_max="max 100000")
    assert host_limits.memory_bytes() == MACHINE
    assert host_limits.processors() == 64
    limit(top / below, memory_max=str(GIB // 2), cpu_max="150000 100000")
    assert host_limits.memory_bytes() == GIB // 2
    assert host_limits.processors() == 2
    limit(service, memory_high=str(GIB // 4), cpu_max="10000 100000")
    assert host_limits.memory_bytes() == GIB // 4
    assert host_limits.processors() == 1


def test_version_1_each_controller_has_its_own_group(files):
    memory = mount(files, "cgroup", "memory")
    cpu = mount(files, "cgroup", "cpu,cpuacct")
    group(files, "4:memory:/slurm/job_7")
    group(files, "2:cpu,cpuacct:/slurm")
    group(files, "0::/")
    limit(memory / "slurm" / "job_7", memory_limit_in_bytes=str(GIB))
    limit(memory, memory_limit_in_bytes=str(2**63 - 4096))  # as it says: no limit
    limit(cpu / "slurm", cpu_cfs_quota_us="250000", cpu_cfs_period_us="100000")
    limit(cpu, cpu_cfs_quota_us="-1", cpu_cfs_period_us="100000")
    assert host_limits.memory_bytes() == GIB
    assert host_limits.processors() == 3


def test_a_container_that_sees_only_its_own_group(files):
    # Version 1: the mount's root is the container's group.
    memory = mount(files, "cgroup", "memory", root="/docker/abc")
    group(files, "4:memory:/docker/abc")
    limit(memory, memory_limit_in_bytes=str(GIB))
    # Version 2: the group is the host's name for it, which is not below the mount.
    unified = mount(files, "cgroup2", "rw", root="/elsewhere")
    group(files, "0::/docker/abc")
    limit(unified, cpu_max="400000 100000")
    assert host_limits.memory_bytes() == GIB
    assert host_limits.processors() == 4


def test_an_address_space_that_is_limited_counts(monkeypatch):
    limits = (GIB, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    assert host_limits.memory_bytes() == GIB


CONTROLLERS = Path("/sys/fs/cgroup")


@pytest.fixture
def real_group() -> Iterator[tuple[Path, Path]]:
    """A group of this kernel's below the root, with 256 MiB and half a processor."""
    name = f"gradwire-test-{os.getpid()}"
    if (CONTROLLERS / "cgroup.controllers").exists():
        made = {CONTROLLERS / name}
        texts = {"memory.max": "268435456", "cpu.max": "50000 100000"}
    else:
        made = {CONTROLLERS / "memory" / name, CONTROLLERS / "cpu" / name}
        texts = {"memory.limit_in_bytes": "268435456", "cpu.cfs_quota_us": "50000"}
    try:
        for directory in made:
            directory.mkdir()
        for file, text in texts.items():
            (found,) = (d / file for d in made if (d / file).exists())
            found.write_text(text)
    except (OSError, ValueError) as error:
        for directory in made:
            if directory.exists():
                directory.rmdir()
        pytest.skip(f"no control group can be made here: {error}")
    try:
        yield tuple(sorted(made))
    finally:
        for directory in made:
            directory.rmdir()


def test_a_real_group_below_the_root_is_seen(real_group):
    program = (
        "import os, sys\n"
        "for path in sys.argv[1:]:\n"
        "    open(path + '/cgroup.procs', 'w').write(str(os.getpid()))\n"
        "from gradwire_server.backends import host_limits\n"
        "print(host_limits.memory_bytes(), host_limits.processors())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, real_group)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == ["268435456", "1"]
