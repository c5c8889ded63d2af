"""Nothing that hangs outlives its bound, nor ends without saying where it was."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from tests.support.observing import wait_until

ROOT = Path(__file__).resolve().parents[2]

HANGING_TESTS = """
    import ctypes
    import signal
    import threading

    def test_that_waits_for_ever():
        threading.Event().wait()

    def test_that_no_signal_reaches():
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True:
            ctypes.PyDLL(None).sleep(1000)  # no other thread of Python's runs

    def test_beside_them():
        pass
"""


def test_tests_that_hang_fail_with_their_stacks_and_the_others_go_on(
    tmp_path: Path,
) -> None:
    (tmp_path / "test_hanging.py").write_text(textwrap.dedent(HANGING_TESTS))
    settings = ["-c", ROOT / "pyproject.toml", "--rootdir", tmp_path]
    options = ["-n2", "--dist=worksteal", "--timeout=0.5"]
    options += ["-o", "faulthandler_timeout=1"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", tmp_path, *settings, *options],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 1
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(r"=+ 2 failed, 1 passed in \S+s =+", last)
    assert "Failed: Timeout (>0.5s)" in done.stdout
    assert "crashed while running" in done.stdout
    assert "in test_that_no_signal_reaches" in done.stderr


STUBBORN = """
    import os, signal, subprocess, sys, threading, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ignores = (
        "import signal, time\\n"
        "for each in (signal.SIGTERM, signal.SIGABRT, signal.SIGINT):\\n"
        "    signal.signal(each, signal.SIG_IGN)\\n"
        "print('ready', flush=True)\\n"
        "time.sleep(1000)"
    )
    child = subprocess.Popen([sys.executable, "-c", ignores], stdout=subprocess.PIPE)
    child.stdout.readline()
    print(child.pid, flush=True)

    def elsewhere():
        threading.Event().wait()

    if sys.argv[1] == "hangs":
        threading.Thread(target=elsewhere).start()
        threading.Event().wait()
"""


@pytest.mark.parametrize(("how", "status"), [("hangs", 124), ("ends", 0)])
def test_a_command_is_ended_with_all_that_it_started(how: str, status: int) -> None:
    script = [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(STUBBORN)]
    done = subprocess.run(
        [ROOT / "scripts" / "within", "3" if how == "hangs" else "60", *script, how],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ
        | {"COVERAGE_PROCESS_CONFIG": ""}  # it ends as none should
        | {"WITHIN_PRINTS_S": "1"},
    )
    assert done.returncode == status, done.stderr
    if how == "hangs":
        assert done.stderr.count("most recent call first") == 2
        assert "in elsewhere" in done.stderr
    (child,) = map(int, done.stdout.split())
    wait_until(lambda: has_ended(child), "what it started has ended")


def has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_command_that_is_asked_to_stop_is_ended_too() -> None:
    script = [sys.executable, "-c", textwrap.dedent(STUBBORN), "hangs"]
    with subprocess.Popen(
        [ROOT / "scripts" / "within", "60", *script], stdout=subprocess.PIPE, text=True
    ) as within:
        assert within.stdout is not None
        child = psutil.Process(int(within.stdout.readline()))
        within.send_signal(signal.SIGTERM)
        assert within.wait(20) == 143
        child.wait(20)
