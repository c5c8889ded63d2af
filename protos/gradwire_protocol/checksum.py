"""CRC-32C of payloads, with google-crc32c.

google-crc32c comes with the extras `cli` and `server`. Without it, a client or
server neither offers nor accepts checksums.
"""

from __future__ import annotations

from collections.abc import Callable

_crc32c: Callable[[bytes], int] | None
try:
    from google_crc32c import value as _crc32c
except ImportError:
    _crc32c = None

AVAILABLE = _crc32c is not None
"""Whether google-crc32c is installed."""


def crc32c(payload: bytes | memoryview) -> int:
    """Compute the CRC-32C (Castagnoli) of the payload.

    Raises:
        RuntimeError: google-crc32c is not installed.
    """
    if _crc32c is None:
        raise RuntimeError("checksums need the package google-crc32c")
    return _crc32c(bytes(payload))
