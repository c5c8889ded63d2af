"""Jobs through each proxy over a link with a round trip of 20 ms."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from bench.links.namespaces import LinkError, link
from tests.proxies.running import KINDS, Kind, running_proxy
from tests.support.serving import running_server

ROUND_TRIP_S = 0.02
JOB = (100_000, 80, 80)
"""32 MB of rows each way."""
MOST_RATIO = 3.0
"""Of a job's time through a proxy to its time without one. With nginx's defaults it is
10, and so with any window of 64 KiB."""


@dataclass(frozen=True)
class Far:
    """The other end of a link."""

    host: str
    there: Sequence[str]
    """Prefix of a command that runs there."""
    here: Sequence[str]
    """And of one that runs at this end."""
    servers: Sequence[str]

    def run(
        self, address: str, job: Sequence[int] = JOB, count: int = 3
    ) -> dict[str, Any]:
        """The times and the bits of some jobs."""
        command = [sys.executable, "-m", "tests.proxies.client", address]
        done = subprocess.run(
            [*self.here, *command, *map(str, job), str(count)],
            capture_output=True,
            text=True,
            check=False,
            timeout=110,
        )
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer


@pytest.fixture(scope="module")
def far() -> Iterator[Far]:
    try:
        with link(1e10, ROUND_TRIP_S) as here:
            settings = dict(part.split("=", 1) for part in here if "=" in part)
            host = settings["BENCH_SERVER_HOST"]
            there = settings["BENCH_SERVER_COMMAND"].split()
            given: dict[str, Any] = {
                "listen": [f"{host}:0"],
                "insecure": True,
                "prefix": there,
            }
            with running_server(**given) as one, running_server(**given) as other:
                yield Far(host, there, here, (one.address, other.address))
    except LinkError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def direct(far: Far) -> dict[str, Any]:
    return far.run(far.servers[0])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_proxy_does_not_slow_a_long_link_down(
    far: Far, direct: dict[str, Any], kind: Kind
) -> None:
    with running_proxy(kind, far.servers, host=far.host, prefix=far.there) as address:
        through = far.run(address)
    assert through["digest"] == direct["digest"]
    assert min(through["seconds"]) < MOST_RATIO * min(direct["seconds"])
