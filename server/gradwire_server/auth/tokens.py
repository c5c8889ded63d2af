"""Tokens, and the file that maps them to tenants.

    [[tokens]]
    tenant = "alice"
    sha256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
    created = 2026-11-26

    [tenants.alice]
    max-jobs = 4

A section [tenants.NAME] overrides the server's settings tenant-max-jobs,
tenant-memory-limit (in bytes), tenant-max-queue, tenant-keep-limit (in bytes) and
tenant-max-sessions for one tenant.

The file holds only a token's SHA-256, so a reader of the file cannot make calls. A
slow, salted hash as for passwords would add nothing: it protects secrets that can be
guessed, and 256 random bits cannot.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import re
import secrets
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from gradwire_protocol.limits import MIB
from gradwire_server.admission.tenancy import MAX_NAME_LENGTH, Limits, is_name

PREFIX = "gw_"
"""Prefix of every token, so that scanners find leaked tokens: they match
``gw_[A-Za-z0-9_-]{43}``."""

_SECRET_BYTES = 32
_SHA256 = re.compile("[0-9a-f]{64}")
_ID_LENGTH = 16


@dataclass(frozen=True, slots=True)
class Entry:
    """A token's entry in the file."""

    tenant: str
    """The token's tenant."""
    sha256: str
    """Hash of the token's characters, in hex."""
    created: datetime.date | None = None

    @property
    def id(self) -> str:
        """Public identifier of the token, for people and for the file's index."""
        return self.sha256[:_ID_LENGTH]

    def toml(self) -> str:
        """Return the entry's lines in the file."""
        lines = [
            "[[tokens]]",
            f"tenant = {_quoted(self.tenant)}",
            f'sha256 = "{self.sha256}"',
        ]
        if self.created is not None:
            lines.append(f"created = {self.created.isoformat()}")
        return "\n".join(lines) + "\n"


class Tokens:
    """The tokens of a file.

    Args:
        entries: The file's entries.
        limits: Overridden limits of each tenant, by the names of `Limits`.

    Raises:
        ValueError: A token occurs twice.
    """

    def __init__(
        self, entries: list[Entry], limits: Mapping[str, Mapping[str, int]]
    ) -> None:
        self._limits = limits
        self._by_id = {entry.id: entry for entry in entries}
        if len(self._by_id) < len(entries):
            raise ValueError("a sha256 stands there twice")

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._by_id.values())

    def tenant_of(self, token: str) -> str | None:
        """Return a token's tenant, or None if the token is unknown."""
        # The lookup by a part of the hash need not take constant time: without
        # the token an attacker cannot choose its hash, and the timing reveals
        # parts of a hash, from which no token follows.
        digest = sha256_of(token)
        entry = self._by_id.get(digest[:_ID_LENGTH])
        if entry is None or not hmac.compare_digest(entry.sha256, digest):
            return None
        return entry.tenant

    def limits_of(self, tenant: str, others: Limits) -> Limits:
        """Return a tenant's limits.

        Args:
            tenant: The tenant's name.
            others: Limits of tenants without overrides.
        """
        return replace(others, **self._limits.get(tenant, {}))


def new_token(tenant: str, today: datetime.date) -> tuple[str, Entry]:
    """Return a new random token, and its entry for the file.

    Raises:
        ValueError: The tenant's name is invalid.
    """
    if not is_name(tenant):
        raise ValueError(_NO_NAME.format(what="the tenant"))
    token = PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
    return token, Entry(tenant, sha256_of(token), today)


def sha256_of(token: str) -> str:
    """Return a token's hash, as in the file."""
    return hashlib.sha256(token.encode()).hexdigest()


def parse_tokens(content: bytes) -> Tokens:
    """Parse a tokens file.

    Raises:
        ValueError: The content is invalid; the text names the fault, and quotes nothing
            that could be a token.
    """
    try:
        document = tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no TOML file: {error}") from None
    _require_keys(document, {"tokens", "tenants"}, "the file")
    entries = document.get("tokens", [])
    if not isinstance(entries, list):
        raise ValueError(_NO_SECTIONS)  # noqa: TRY004 - a file is wrong, no argument
    tenants = document.get("tenants", {})
    if not isinstance(tenants, dict):
        raise ValueError(_NO_TENANTS)  # noqa: TRY004 - a file is wrong, no argument
    return Tokens(
        [_entry(entry, at) for at, entry in enumerate(entries, 1)],
        {tenant: _limits(fields, tenant) for tenant, fields in tenants.items()},
    )


def without(text: str, token_id: str) -> str:
    """Return the file's text without a token, otherwise unchanged.

    Raises:
        ValueError: The text has no section for the token.
    """
    sections = re.split(r"^(?=[ \t]*\[)", text, flags=re.MULTILINE)
    kept = [section for section in sections if not _is_of(section, token_id)]
    if len(kept) == len(sections):
        raise ValueError(f"it has no section [[tokens]] for the token {token_id}")
    return "".join(kept)


def _is_of(section: str, token_id: str) -> bool:
    if not section.lstrip().startswith("[[tokens]]"):
        return False
    return any(entry.id == token_id for entry in parse_tokens(section.encode()))


def _entry(fields: object, at: int) -> Entry:
    where = f"the {at}. of [[tokens]]"
    if not isinstance(fields, dict):
        raise ValueError(_NO_SECTIONS)  # noqa: TRY004 - a file is wrong, no argument
    _require_keys(fields, {"tenant", "sha256", "created"}, where)
    tenant, sha256 = fields.get("tenant"), fields.get("sha256")
    created = fields.get("created")
    if not isinstance(tenant, str) or not is_name(tenant):
        raise ValueError(_NO_NAME.format(what=f"{where} has a tenant that"))
    # The value is not quoted: it may be a pasted token.
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise ValueError(f"{where} has a sha256 that is not 64 hex digits (0-9, a-f)")
    if created is not None and not isinstance(created, datetime.date):
        raise ValueError(f"{where} has a created that is no date like 2026-11-26")
    return Entry(tenant, sha256, created)


def _limits(fields: object, tenant: str) -> dict[str, int]:
    if not is_name(tenant):
        raise ValueError(_NO_NAME.format(what="a section [tenants.NAME] whose name"))
    where = f"[tenants.{tenant}]"
    if not isinstance(fields, dict):
        raise ValueError(_NO_TENANTS)  # noqa: TRY004 - a file is wrong, no argument
    _require_keys(fields, set(_LEAST), where)
    for key, value in fields.items():
        # bool is a subclass of int.
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value < _LEAST[key]:
            raise ValueError(
                f"{where} has a {key} that is no whole number of at least {_LEAST[key]}"
            )
    return {key.replace("-", "_"): value for key, value in fields.items()}


def _require_keys(table: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(table.keys() - known)
    if unknown:
        expected = ", ".join(sorted(known))
        raise ValueError(f"{where} has a key that is none of {expected}")


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


_LEAST = {
    "max-jobs": 1,
    "memory-limit": 4 * MIB,
    "max-queue": 0,
    "keep-limit": 0,
    "max-sessions": 1,
}
_NO_TENANTS = "tenants is no table of sections [tenants.NAME]"
_NO_SECTIONS = "tokens is no list of sections [[tokens]]"
_NO_NAME = (
    "{what} is no name: expected 1 to "
    + str(MAX_NAME_LENGTH)
    + " printable ASCII characters"
)
