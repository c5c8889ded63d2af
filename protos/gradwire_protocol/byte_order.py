"""What gradwire asks of the machine that it is imported on."""

from __future__ import annotations

import sys


def require_little_endian(byteorder: str = sys.byteorder) -> None:
    """Refuse a host that keeps the bytes of a number in the other order.

    Elements travel as they lie in memory, little-endian.

    Args:
        byteorder: The host's, as `sys.byteorder` has it.

    Raises:
        ImportError: It is not ``"little"``.
    """
    if byteorder != "little":
        raise ImportError(
            f"gradwire needs a little-endian host, and this one is {byteorder}-endian"
        )
