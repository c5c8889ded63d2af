"""The port for Prometheus."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus

from gradwire_server.api.figures import take_figures
from gradwire_server.api.job_service import JobService
from gradwire_server.errors import ListenError
from gradwire_server.observability.figures import Figures
from gradwire_server.observability.totals import Totals
from gradwire_server.transports.http_listener import HttpListener, Page

PATH = "/metrics"


class MetricsListener:
    """Serves a server's metrics on an address of its own.

    Args:
        address: HOST:PORT, or PORT of loopback; port 0 takes a free port.
        totals: An observer of all calls of the server.

    Raises:
        ListenError: The address cannot be listened on, or a package is missing.

    Attributes:
        service: The job service; None until it has started.
        url: The address of the metrics.
    """

    def __init__(self, address: str, totals: Totals) -> None:
        self._render = _renderer()
        self.service: JobService | None = None
        self._totals = totals
        self._pages = _Pages(self._made)
        self._http = HttpListener(address, PATH, self._page)
        self.url = f"http://{self._http.address}{PATH}"

    async def start(self) -> None:
        """Begin to answer."""
        await self._http.start()

    async def close(self) -> None:
        """Close the port."""
        await self._http.close()

    async def _page(self, headers: Mapping[str, str]) -> Page:
        return await self._pages.next(_format(headers.get("accept", "")))

    async def _made(self, accept: str) -> Page:
        if self.service is None:
            return Page(b"the server starts\n", status=HTTPStatus.SERVICE_UNAVAILABLE)
        figures = take_figures(self.service, self._totals)
        # Writing them as text takes milliseconds, for which small calls would wait.
        text, content_type = await asyncio.to_thread(self._render, figures, accept)
        return Page(text, content_type)


def _format(accept: str) -> str:
    """Return the header "Accept" of the format that a request accepts.

    Requests may have anything there, of which prometheus-client makes exceptions.
    """
    accepted = {each.partition(";")[0].strip() for each in accept.split(",")}
    return f"{_OPEN_METRICS}; version=1.0.0" if _OPEN_METRICS in accepted else ""


_OPEN_METRICS = "application/openmetrics-text"


class _Pages:
    """Makes one page after the other, each for all who wait for it.

    After each there is a pause: anybody may ask again and again, and all calls would
    wait for the interpreter meanwhile.

    Args:
        make: Makes a page of this moment's figures in a format.
    """

    def __init__(self, make: Callable[[str], Awaitable[Page]]) -> None:
        self._make = make
        self._next: dict[str, asyncio.Task[Page]] = {}
        self._turn = asyncio.Lock()
        self._free_at = 0.0

    async def next(self, accept: str) -> Page:
        """Return the next page, whose figures are not older than this call."""
        page = self._next.get(accept)
        if page is None:
            page = asyncio.create_task(self._made(accept))
            page.add_done_callback(_seen)
            self._next[accept] = page
        return await asyncio.shield(page)

    async def _made(self, accept: str) -> Page:
        loop = asyncio.get_running_loop()
        async with self._turn:
            await asyncio.sleep(max(self._free_at - loop.time(), 0.0))
            del self._next[accept]
            began = loop.time()
            try:
                return await self._make(accept)
            finally:
                took_s = loop.time() - began
                self._free_at = loop.time() + min(_PAUSE * took_s, _MAX_PAUSE_S)


def _seen(page: asyncio.Task[Page]) -> None:
    """Take note of an exception: those who have waited for it may be gone."""
    if not page.cancelled():
        page.exception()


_PAUSE = 9.0
"""A pause, in times of the page before: pages take a tenth of one thread's time."""

_MAX_PAUSE_S = 0.5


def _renderer() -> Callable[[Figures, str], tuple[bytes, str]]:
    """Return `prometheus.render`.

    Raises:
        ListenError: prometheus-client is not installed.
    """
    try:
        # Comes with the extra `server`, and is needed here alone.
        from gradwire_server.observability.prometheus import render  # noqa: PLC0415
    except ImportError as error:
        raise ListenError(
            f"metrics_listen is set, and prometheus-client cannot be imported "
            f"({error}): install gradwire[server]"
        ) from None
    return render
