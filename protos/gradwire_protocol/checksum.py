"""CRC-32C of payloads, where a library that computes it is installed.

google-crc32c comes with the extras `cli` and `server`; the base install does
without, and then neither side offers or accepts checksums.
"""

from __future__ import annotations

from collections.abc import Callable

_crc32c: Callable[[bytes], int] | None
try:
    from google_crc32c import value as _crc32c
except ImportError:
    _crc32c = None

AVAILABLE = _crc32c is not None
"""Whether payloads can be checked in this process."""


def crc32c(payload: bytes | memoryview) -> int:
    """CRC-32C (Castagnoli) of the payload.

    Raises:
        RuntimeError: google-crc32c is not installed.
    """
    if _crc32c is None:
        raise RuntimeError("checksums need the package google-crc32c")
    return _crc32c(bytes(payload))
