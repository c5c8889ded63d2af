"""Traces of calls, for OpenTelemetry: where they go, and whether there are any."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any

from gradwire_server.errors import TracesError
from gradwire_server.observability.calls import CallObserver

if TYPE_CHECKING:
    from gradwire_server.observability.otlp import Otlp

_API = "opentelemetry.trace"


class Tracing:
    """The tracer of one server.

    Spans go to the process's tracer provider, if it has one, as a program that embeds
    a server may; otherwise, if asked for, by OTLP. With neither there are none, and
    OpenTelemetry is not even imported.

    Args:
        otlp: Whether to send spans by OTLP.

    Raises:
        TracesError: Spans cannot be sent by OTLP.

    Attributes:
        observer: The observer that makes the spans; None if there are none.
    """

    def __init__(self, *, otlp: bool) -> None:
        self.observer: CallObserver | None = None
        self._otlp: Otlp | None = None
        provider = process_provider()
        if provider is None and otlp:
            self._otlp = _otlp()
            provider = self._otlp.provider
        if provider is not None:
            # Imported here: it needs opentelemetry-api.
            from gradwire_server.observability.call_spans import CallSpans  # noqa: PLC0415

            self.observer = CallSpans(provider)

    def addresses(self) -> dict[str, str]:
        """Return where spans are sent, for the log."""
        return {} if self._otlp is None else {"traces": self._otlp.endpoint}

    async def close(self) -> None:
        """Send the last spans, within a bounded time."""
        if self._otlp is not None:
            self._otlp.close()
            await asyncio.to_thread(self._otlp.wait)


def process_provider() -> Any:
    """Return the process's tracer provider; None if it has none."""
    api = sys.modules.get(_API)
    if api is None:
        return None
    provider = api.get_tracer_provider()
    none = (api.ProxyTracerProvider, api.NoOpTracerProvider)
    return None if isinstance(provider, none) else provider


def _otlp() -> Otlp:
    try:
        # Comes with the extra `otel`, and is needed here alone.
        from gradwire_server.observability.otlp import Otlp  # noqa: PLC0415
    except ImportError as error:
        raise TracesError(
            f"traces is set, and OpenTelemetry cannot be imported ({error}): install "
            f"gradwire[otel]"
        ) from None
    return Otlp()
