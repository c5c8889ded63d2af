"""The ports beside the service's own: for health probes, and for Prometheus."""

from __future__ import annotations

from gradwire_server.api.job_service import JobService
from gradwire_server.api.metrics_listener import MetricsListener
from gradwire_server.api.standard.health import Health
from gradwire_server.api.standard.health_listener import HealthListener
from gradwire_server.observability.totals import Totals
from gradwire_server.settings import Settings


class SideListeners:
    """The ports that the settings ask for, open as long as the server is.

    Args:
        settings: The operator's settings.
        health: The server's health.
    """

    def __init__(self, settings: Settings, health: Health) -> None:
        self._settings = settings
        self._status = health
        self.totals: Totals | None = None
        """An observer of all calls, for metrics; None if nothing serves them."""
        if settings.metrics_listen is not None:
            self.totals = Totals(tenants=settings.metrics_tenants)
        self._metrics: MetricsListener | None = None
        self._health: HealthListener | None = None

    async def start(self) -> None:
        """Listen, and answer.

        Raises:
            ListenError: An address cannot be listened on, or a package is missing.
        """
        settings = self._settings
        if settings.metrics_listen is not None and self.totals is not None:
            self._metrics = MetricsListener(settings.metrics_listen, self.totals)
            await self._metrics.start()
        if settings.health_listen is not None:
            self._health = HealthListener(settings.health_listen, self._status)
            await self._health.start()

    def serve(self, service: JobService) -> None:
        """Serve the figures of a job service that has started."""
        if self._metrics is not None:
            self._metrics.service = service

    @property
    def metrics_url(self) -> str | None:
        """URL of the metrics; None if they are not served."""
        return None if self._metrics is None else self._metrics.url

    @property
    def health_address(self) -> str | None:
        """Address for health probes alone; None if there is none."""
        return None if self._health is None else self._health.address

    def addresses(self) -> dict[str, str]:
        """Return the addresses that there are, by what they are for."""
        every = {"metrics": self.metrics_url, "health": self.health_address}
        return {name: address for name, address in every.items() if address}

    async def close(self) -> None:
        """Close the ports."""
        for each in (self._health, self._metrics):
            if each is not None:
                await each.close()
