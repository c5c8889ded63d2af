"""One log line for each call, with structured fields."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

from gradwire_protocol.error_reasons import Reason
from gradwire_server.errors import JobError
from gradwire_server.observability.calls import Call, CallObserver
from gradwire_server.observability.repeats import Repeats

_log = logging.getLogger("gradwire_server")


class _Kind(NamedTuple):
    """Lines that count together. One tenant's do not hide another's."""

    reason: Reason | str
    """A reason, or what a client reports."""
    tenant: str


class AccessLog(CallObserver):
    """Writes a line when a call ends.

    Of the calls that fail alike, only the first ones within some seconds have a line,
    and one more line says how many others there were.

    Args:
        repeats: Decides which lines are written; by default `MOST_ALIKE` of a kind
            within `WINDOW_S`.
    """

    def __init__(self, repeats: Repeats[_Kind] | None = None) -> None:
        self._repeats = repeats or Repeats(MOST_ALIKE, WINDOW_S)
        self._repeats.tell = self._tell

    def ended(
        self, call: Call, reason: Reason | None, error: JobError | None = None
    ) -> None:
        """Write the call's line."""
        if reason is None:
            _write(logging.INFO, call, {"outcome": "OK"})
            return
        fields = {"outcome": reason.status.name, "reason": reason}
        if error is not None:
            fields["error"] = error.message
        elif call.ends_by_cancelling:
            _write(logging.INFO, call, fields)
            return
        if self._repeats.allows(_Kind(reason, call.tenant)):
            private = {} if error is None else error.log
            level = logging.ERROR if private else logging.WARNING
            _write(level, call, fields | private)

    def credentials_refused(self, method: str, peer: str, why: str) -> None:
        """Write a line about a refused caller."""
        reason = Reason.CREDENTIALS_INVALID
        if not self._repeats.allows(_Kind(reason, "")):
            return
        _log.warning(
            "refused",
            extra={
                "method": method[:_SHOWN],
                "outcome": reason.status.name,
                "reason": reason,
                "error": why,
                "peer": peer,
            },
        )

    def reported(self, report: str, job_id: str, tenant: str) -> None:
        """Write a line about a client's report."""
        if not self._repeats.allows(_Kind(report, tenant)):
            return
        _log.error(
            "a client reports a failure of results",
            extra={
                "report": report,
                "job_id": job_id,
                **({"tenant": tenant} if tenant else {}),
            },
        )

    def close(self) -> None:
        """Tell how many lines were left out."""
        self._repeats.close()

    def _tell(self, kind: _Kind, count: int) -> None:
        fields: dict[str, Any] = {"reason": kind.reason, "more_calls": count}
        if isinstance(kind.reason, Reason):
            fields["outcome"] = kind.reason.status.name
        if kind.tenant:
            fields["tenant"] = kind.tenant
        _log.warning(
            "and %s more calls ended with %s in the last %g s",
            f"{count:,}",
            kind.reason,
            self._repeats.window_s,
            extra=fields,
        )


def _write(level: int, call: Call, fields: dict[str, Any]) -> None:
    if _log.isEnabledFor(level):
        _log.log(level, "job", extra=fields | call.log_fields())


MOST_ALIKE = 20
"""Lines of calls of one tenant that failed for one reason, within `WINDOW_S`. A client
that calls again and again would fill a disk otherwise."""

WINDOW_S = 10.0

_SHOWN = 128
"""Characters of a method's name to log: strangers choose it."""
