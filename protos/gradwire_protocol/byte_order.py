"""Check of the host's byte order."""

from __future__ import annotations

import sys


def require_little_endian(byteorder: str = sys.byteorder) -> None:
    """Refuse a big-endian host.

    Elements are sent as they are in memory, and the wire format is little-endian.

    Args:
        byteorder: The host's byte order, as in `sys.byteorder`.

    Raises:
        ImportError: The byte order is not ``"little"``.
    """
    if byteorder != "little":
        raise ImportError(
            f"gradwire needs a little-endian host, and this one is {byteorder}-endian"
        )
