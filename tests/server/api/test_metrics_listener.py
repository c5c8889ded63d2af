"""The port for Prometheus, with more scrapers than it needs."""

from __future__ import annotations

import asyncio
import http.client
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest

from gradwire_server.api import metrics_listener
from gradwire_server.api.metrics_listener import MetricsListener
from gradwire_server.observability.totals import Totals

PAGE_S = 0.02


class Made(NamedTuple):
    """A listener, and the figures of each page that it has made."""

    listener: MetricsListener
    figures: list[int]
    now: list[int]
    """The figure of this moment."""


@pytest.fixture
async def made(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Made]:
    figures: list[int] = []
    now = [0]

    def render(figure: int, accept: str) -> tuple[bytes, str]:
        figures.append(figure)
        time.sleep(PAGE_S)
        return f"{figure} {accept}".encode(), "text/plain"

    monkeypatch.setattr(metrics_listener, "take_figures", lambda *_: now[0])
    monkeypatch.setattr(metrics_listener, "_renderer", lambda: render)
    listener = MetricsListener("0", Totals())
    service: Any = object()
    listener.service = service
    await listener.start()
    yield Made(listener, figures, now)
    await listener.close()


def scrape(url: str, accept: str = "") -> str:
    connection = http.client.HTTPConnection(url.split("/")[2], timeout=20)
    try:
        connection.request("GET", "/metrics", headers={"Accept": accept})
        answer = connection.getresponse()
        assert answer.status == 200
        return answer.read().decode()
    finally:
        connection.close()


async def test_many_scrapers_share_pages_that_are_not_older_than_their_requests(
    made: Made,
) -> None:
    scrapers = ThreadPoolExecutor(24)  # the loop's own threads make the pages

    async def one(number: int) -> int:
        made.now[0] = number
        loop = asyncio.get_running_loop()
        text = await loop.run_in_executor(scrapers, scrape, made.listener.url)
        return int(text.split()[0])

    with scrapers:
        found = await asyncio.gather(*(one(number) for number in range(24)))
    assert all(had >= asked for asked, had in enumerate(found))
    assert len(made.figures) < 12
    assert sorted(made.figures) == made.figures


async def test_pages_leave_the_interpreter_to_calls_most_of_the_time(
    made: Made,
) -> None:
    began = time.perf_counter()
    for number in range(6):
        made.now[0] = number
        text = await asyncio.to_thread(scrape, made.listener.url)
        assert text.split()[0] == str(number)
    assert time.perf_counter() - began > 5 * 10 * PAGE_S


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", ""),
        ("text/plain; version=wrong, */*", ""),
        ("application/openmetrics-text", "open"),
        ("application/openmetrics-text; version=wrong", "open"),
        ("text/plain;q=0.5,application/openmetrics-text;version=9.9.9;q=0.9", "open"),
    ],
)
async def test_whatever_a_request_accepts_one_of_two_formats_is_made(
    made: Made, accept: str, expected: str
) -> None:
    text = await asyncio.to_thread(scrape, made.listener.url, accept)
    known = {"": "", "open": "application/openmetrics-text; version=1.0.0"}
    assert text == f"0 {known[expected]}"
