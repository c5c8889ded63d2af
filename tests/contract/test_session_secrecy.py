"""Whether a session of another tenant exists cannot be told from how long calls take.

The times of refused calls are compared by rank, and the comparison says what it would
have seen. `tests/server/sessions/test_secrecy.py` looks at the lookup itself.
"""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from gradwire.v1 import gradient_service_pb2
from gradwire.v1 import session_service_pb2 as pb2
from tests.support.credentials import authorized, make_tokens
from tests.support.ranks import LEVEL, rank_z, smallest_seen
from tests.support.raw import SERVICE, CallError, whole_numbers
from tests.support.serving import running_server
from tests.support.sessions import SESSION_SERVICE, RawSessions, kept

PROBLEM = whole_numbers(8, 5, 4)
SESSIONS = 60
CALLS = 5000
"""Calls of each kind."""


@pytest.fixture(scope="module")
def times(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Measures refused calls with tokens of both kinds, in random order."""
    tokens, text = make_tokens("owner", "stranger")
    file = tmp_path_factory.mktemp("tokens") / "tokens.toml"
    file.write_text(text)
    with (
        running_server(auth_tokens=str(file)) as server,
        grpc.insecure_channel(server.address) as plain,
    ):
        owner = RawSessions(authorized(plain, tokens["owner"]))
        sessions = [owner.open(4096) for _ in range(SESSIONS)]
        for each in sessions:
            each.put(1, PROBLEM.w)
        foreign = [each.token for each in sessions]
        unknown = [secrets.token_urlsafe(32) for _ in foreign]
        stranger = authorized(plain, tokens["stranger"])

        def measure(
            method: str, request_of: Callable[[str], bytes]
        ) -> list[np.ndarray]:
            call = stranger.unary_unary(method)
            kinds = [
                [request_of(token) for token in each] for each in (foreign, unknown)
            ]
            order = [0, 1] * (CALLS + 200)
            random.Random(0).shuffle(order)
            found: list[list[float]] = [[], []]
            for number, kind in enumerate(order):
                request = kinds[kind][number % SESSIONS]
                begun = time.perf_counter()
                try:
                    call(request, timeout=20)
                except grpc.RpcError as error:
                    took = time.perf_counter() - begun
                    assert CallError(error).reason == "SESSION_UNKNOWN"  # noqa: PT017
                if number >= 400:
                    found[kind].append(took)
            return [np.array(each) for each in found]

        yield measure


def renew(token: str) -> bytes:
    return pb2.RenewSessionRequest(session=token).SerializeToString()


def compute(token: str) -> bytes:
    job = PROBLEM.job(session={"session": token}, w=kept(1))
    return gradient_service_pb2.ComputeRequest(
        job=job, x=PROBLEM.x.tobytes(), dy=PROBLEM.dy.tobytes()
    ).SerializeToString()


@pytest.mark.big
@pytest.mark.parametrize(
    ("method", "request_of"),
    [
        (f"/{SESSION_SERVICE}/RenewSession", renew),
        (f"/{SERVICE}/Compute", compute),
    ],
    ids=["renew", "compute"],
)
def test_a_foreign_session_takes_as_long_to_refuse_as_an_unknown_one(
    times, method, request_of
) -> None:
    foreign, unknown = times(method, request_of)
    z, shift = rank_z(foreign, unknown), smallest_seen(foreign, unknown, 1e-7)
    medians = [1e6 * float(np.median(each)) for each in (foreign, unknown)]
    figures = (
        f"{len(foreign)} and {len(unknown)} calls, medians {medians[0]:.1f} and "
        f"{medians[1]:.1f} us, {z:+.2f} standard deviations, "
        f"{1e6 * shift:.1f} us would be seen"
    )
    print(figures)
    assert abs(z) < LEVEL, figures
    # On a machine that is so busy that nothing would be seen, nothing is shown.
    assert shift < 0.2e-6 * medians[1], figures
