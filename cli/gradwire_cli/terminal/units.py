"""Sizes and times in readable units."""

from __future__ import annotations

import re

_FACTORS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "ki": 1 << 10,
    "mi": 1 << 20,
    "gi": 1 << 30,
    "ti": 1 << 40,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def parse_bytes(text: str) -> int:
    """Parse a size in bytes: ``4GiB``, ``512 MiB``, ``1000000``.

    KiB, MiB, GiB and TiB (or Ki, Mi, Gi, Ti) are powers of 1024; kB, MB, GB
    and TB are powers of 1000.

    Raises:
        ValueError: The text is not a size; the message gives examples.
    """
    match = _SIZE.fullmatch(text.strip())
    factor = _FACTORS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise ValueError(
            f"{text!r} is not a number of bytes: expected one like 4GiB, 512MiB, "
            "2GB or 1000000"
        )
    try:
        number = float(match[1]) if "." in match[1] else int(match[1])
        return int(number * factor)
    except (OverflowError, ValueError):  # int limits the number of digits
        raise ValueError("too many digits for a number of bytes") from None


def format_bytes(size: float) -> str:
    """Format `size` bytes in powers of 1024, with at least three digits."""
    value = float(size)
    for unit in _BINARY:
        if abs(value) < 1024 or unit == _BINARY[-1]:
            break
        value /= 1024
    if unit == "B":
        return f"{int(value)} B"
    digits = 0 if value.is_integer() or value >= 100 else 2 if value < 10 else 1
    return f"{value:.{digits}f} {unit}"


def format_seconds(seconds: float) -> str:
    """Format a time in µs, ms or s."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds:.2f} s"
