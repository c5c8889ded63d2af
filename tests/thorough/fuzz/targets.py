"""Everything that is fuzzed, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import Message

from gradwire.v1 import gradient_service_pb2 as service_pb2
from tests.thorough.fuzz import (
    answers,
    credentials,
    direct,
    parsers,
    sessions,
    streams,
)
from tests.thorough.fuzz.containers import Method
from tests.thorough.fuzz.mutations import KindOf
from tests.thorough.fuzz.parsers import Check

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
"""Inputs to begin with, in a folder for each target: see `seeds`."""
REGRESSIONS = HERE / "regressions"
"""Inputs that found something, each named after what it found."""


@dataclass(frozen=True)
class Target:
    """What is fuzzed, and how."""

    open: Callable[[], AbstractContextManager[Check]]
    """Yields what takes an input and raises where something is wrong."""
    share: int
    """Its part of the time."""
    kind_of: KindOf | None = None
    """What the messages of its inputs are, where they are containers."""


def _by_method(kinds: Mapping[Method, type[Message]]) -> KindOf:
    return lambda method, _: (0, kinds.get(method, kinds[Method.STREAM]))


TARGETS = {
    "framing": Target(parsers.framing_both_ways, 1),
    "error-details": Target(parsers.error_details, 1),
    "npy": Target(parsers.npy_files, 1),
    "settings": Target(parsers.settings_files, 1),
    "tokens": Target(credentials.token_files, 1),
    "keys": Target(credentials.key_files, 1),
    "jwts": Target(credentials.jwts, 1),
    "answers": Target(
        answers.any_answers,
        2,
        _by_method({Method.STREAM: service_pb2.ComputeStreamResponse}),
    ),
    "streams": Target(
        streams.live_streams,
        6,
        _by_method(
            {
                Method.STREAM: service_pb2.ComputeStreamRequest,
                Method.COMPUTE: service_pb2.ComputeRequest,
                Method.REGION: service_pb2.OpenRegionRequest,
            }
        ),
    ),
    "direct": Target(direct.live_connections, 3),
    "sessions": Target(
        sessions.live_sessions, 6, lambda _, message: sessions.kind_of(message)
    ),
}


def inputs(folder: Path, name: str) -> list[Path]:
    """A target's inputs in a folder."""
    return sorted(path for path in (folder / name).glob("*") if path.is_file())
