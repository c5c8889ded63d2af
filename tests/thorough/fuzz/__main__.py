"""Fuzzes for a set time: `make fuzz`, or

    python -m tests.thorough.fuzz --seconds 60 [--target NAME]...

What it learns stays in .fuzz, where the next run goes on. An input that finds
something is left there too; once what it found is mended, it belongs into
tests/thorough/fuzz/regressions under a name that says what that was.

    python -m tests.thorough.fuzz --target NAME FILE...

runs these inputs alone.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import subprocess
import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import atheris

with (
    contextlib.redirect_stderr(io.StringIO()),  # a line for each module
    atheris.instrument_imports(include=["gradwire", "gradwire_server"]),
):
    from tests.thorough.fuzz.mutations import mutated
    from tests.thorough.fuzz.targets import CORPUS, REGRESSIONS, TARGETS

LEARNED = Path(".fuzz")
MOST_BYTES = 100_000
HANGS_S = 30


def fuzz(name: str, libfuzzer: list[str]) -> None:
    """Fuzzes a target in this process, which libFuzzer ends."""
    target = TARGETS[name]

    def custom_mutator(data: bytes, max_size: int, seed: int) -> bytes:
        assert target.kind_of is not None
        return mutated(data, max_size, seed, target.kind_of, atheris.Mutate)

    warnings.simplefilter("error")
    with target.open() as check:
        atheris.Setup(
            ["gradwire", *libfuzzer],
            check,
            **({"custom_mutator": custom_mutator} if target.kind_of else {}),
        )
        atheris.Fuzz()


def options(name: str, seconds: int) -> list[str]:
    """What libFuzzer is told; what it learns goes into the first folder."""
    folder = LEARNED / name
    folder.mkdir(parents=True, exist_ok=True)
    kept = [each / name for each in (CORPUS, REGRESSIONS)]
    return [
        f"-max_total_time={seconds}",
        f"-max_len={MOST_BYTES}",
        f"-timeout={HANGS_S}",
        f"-artifact_prefix={LEARNED}/{name}-",
        "-print_final_stats=1",
        "-verbosity=0",
        str(folder),
        *(str(each) for each in kept if each.is_dir()),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.thorough.fuzz")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--target", choices=TARGETS, action="append", default=[])
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("files", nargs="*")
    given = parser.parse_args()
    names = given.target or list(TARGETS)
    if given.files:
        fuzz(names[0], given.files)
    if given.alone:
        fuzz(names[0], options(names[0], given.seconds))
    shares = sum(TARGETS[name].share for name in names)
    failed = []
    for name in names:
        seconds = max(1, given.seconds * TARGETS[name].share // shares)
        print(f"\n{name}: {seconds} s", flush=True)
        command = ("--alone", "--target", name, "--seconds", str(seconds))
        with TemporaryDirectory(prefix="gradwire-fuzz-") as scratch:
            done = subprocess.run(
                [sys.executable, "-m", "tests.thorough.fuzz", *command],
                check=False,
                env=os.environ | {"TMPDIR": scratch},  # libFuzzer leaves what is there
            )
        if done.returncode:
            failed.append(name)
    print(f"\nfound something in: {', '.join(failed)}" if failed else "\nfound nothing")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
