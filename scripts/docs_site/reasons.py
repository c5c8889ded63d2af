"""The table of reasons, from the tables that the SDK itself uses."""

from __future__ import annotations

from gradwire._api.errors import BY_REASON, BY_STATUS, CallError
from gradwire._resilience.retry import is_transient
from gradwire_protocol.error_details import ErrorDetails
from gradwire_protocol.error_reasons import Reason

_ANSWERS = {
    (False, False): "no",
    (True, True): "yes",
    (False, True): "if the server gives a time, and not before it",
}


def markdown() -> str:
    """A row for all reasons with the same status, exception and answer."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for reason in Reason:
        kind = BY_REASON.get(reason, BY_STATUS[reason.status])
        answer = _ANSWERS[_retried(kind, reason, None), _retried(kind, reason, 1.0)]
        row = (reason.status.name, kind.__name__, answer)
        reasons.setdefault(row, []).append(f"`{reason}`")
    lines = ["| status | reasons | exception | tried again |", "| --- |" + " --- |" * 3]
    for (status, kind_name, answer), same in reasons.items():
        exception = f"[`{kind_name}`][gradwire.{kind_name}]"
        lines.append(f"| {status} | {', '.join(same)} | {exception} | {answer} |")
    return "\n".join(lines)


def _retried(kind: type[CallError], reason: Reason, after_s: float | None) -> bool:
    attached = ErrorDetails(reason, retry_after_s=after_s)
    return is_transient(kind("", status=reason.status, attached=attached))
