"""What fuzzing began with and what it once found stays right."""

from __future__ import annotations

import random

import pytest

from tests.thorough.fuzz.containers import Container, Ending, Method, container
from tests.thorough.fuzz.mutations import mutated
from tests.thorough.fuzz.targets import CORPUS, REGRESSIONS, TARGETS, inputs


@pytest.mark.parametrize("name", TARGETS)
def test_every_input_that_is_kept_is_taken_in_order(name: str) -> None:
    seeds = inputs(CORPUS, name)
    assert seeds
    with TARGETS[name].open() as check:
        for path in seeds + inputs(REGRESSIONS, name):
            try:
                check(path.read_bytes())
            except BaseException as error:
                error.add_note(f"the input is {path}")
                raise


def test_no_input_is_kept_that_nothing_is_fuzzed_with() -> None:
    kept = [path for of in (CORPUS, REGRESSIONS) for path in of.glob("*/*")]
    assert {path.parent.name for path in kept} == set(TARGETS)


@pytest.mark.parametrize("name", ["answers", "streams", "direct", "sessions"])
def test_some_accidents_of_every_stream_are_taken_in_order(name: str) -> None:
    """As `make fuzz` has them by the thousand, without what guides it."""
    target = TARGETS[name]
    seeds = [path.read_bytes() for path in inputs(CORPUS, name)]
    rng = random.Random(0)

    def mutate_bytes(data: bytes, most: int) -> bytes:
        at = rng.randint(0, len(data))
        return (data[:at] + rng.randbytes(2) + data[at + rng.randint(0, 2) :])[:most]

    with target.open() as check:
        for seed in range(20 if name == "sessions" else 40):
            data = rng.choice(seeds)
            if target.kind_of is None:
                data = mutate_bytes(data, 1 << 16)
            else:
                data = mutated(data, 1 << 16, seed, target.kind_of, mutate_bytes)
            try:
                check(data)
            except BaseException as error:
                error.add_note(f"the input is {data!r}")
                raise


def test_any_bytes_are_a_container() -> None:
    messages = [b"one", b"", b"three"]
    data = container(messages, Method.COMPUTE, Ending.SILENCE)
    given = Container.unpacked(data)
    assert given == Container(Method.COMPUTE, Ending.SILENCE, messages)
    for size in range(len(data)):
        Container.unpacked(data[:size]).packed()
    assert Container.unpacked(b"") == Container(Method.STREAM, Ending.HALF_CLOSE, [])
