"""What the servers of a spread job must have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from gradwire._api.errors import NumericsError
from gradwire._api.options import Numerics
from gradwire._api.types import ServerInfo
from gradwire_protocol.v1.job_pb2 import Accepted


def numerics_of(info: ServerInfo) -> Numerics | None:
    """Return the numerics of a server; None if it computes no segments.

    Of a server with devices of several kinds, those of the first one. The others'
    jobs are refused when they are accepted.
    """
    if not info.fingerprints or not info.limits.row_block_bytes:
        return None
    first = info.fingerprints[0]
    return Numerics(
        first.library, first.device, first.threads, info.limits.row_block_bytes
    )


def most_common(found: Mapping[str, Numerics]) -> Numerics | None:
    """Return what most servers have, of equally many the first; None without servers.

    Args:
        found: The servers' numerics, by address.
    """
    counts = Counter(found.values()).most_common(1)
    return counts[0][0] if counts else None


def check_numerics(accepted: Accepted, numerics: Numerics, block_rows: int) -> None:
    """Check that a server's results have the bits of the other servers'.

    Args:
        accepted: The server's Accepted.
        numerics: What the servers have in common.
        block_rows: The rows of a row block that follow from them.

    Raises:
        NumericsError: They have not.
    """
    theirs = accepted.fingerprint
    expected = (numerics.library, numerics.device, numerics.threads, block_rows)
    found = (theirs.library, theirs.device, theirs.threads, theirs.block_rows)
    if found != expected:
        raise NumericsError(
            f"the server computes with {_text(*found)}: expected"
            f" {_text(*expected)}, as the other servers of the job"
        )


def _text(library: str, device: str, threads: int, block_rows: int) -> str:
    return f"{library} on {device}, {threads} threads, row blocks of {block_rows} rows"
