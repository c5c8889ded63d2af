"""The port for Prometheus."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
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
        self._http = HttpListener(address, PATH, self._page)
        self.url = f"http://{self._http.address}{PATH}"

    async def start(self) -> None:
        """Begin to answer."""
        await self._http.start()

    async def close(self) -> None:
        """Close the port."""
        await self._http.close()

    async def _page(self, headers: Mapping[str, str]) -> Page:
        if self.service is None:
            return Page(b"the server starts\n", status=HTTPStatus.SERVICE_UNAVAILABLE)
        figures = take_figures(self.service, self._totals)
        # Writing them as text takes milliseconds, for which small calls would wait.
        accept = headers.get("accept", "")
        text, content_type = await asyncio.to_thread(self._render, figures, accept)
        return Page(text, content_type)


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
