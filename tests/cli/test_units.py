"""Numbers of bytes as people write and read them."""

from __future__ import annotations

import pytest

from gradwire_cli.terminal.units import format_bytes, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1000000", 1_000_000),
        ("0", 0),
        ("4GiB", 4 * 2**30),
        ("4gib", 4 * 2**30),
        ("512 MiB", 512 * 2**20),
        ("512Mi", 512 * 2**20),
        ("1.5KiB", 1536),
        ("2GB", 2 * 10**9),
        ("3kB", 3000),
        ("9007199254740993", 9007199254740993),
        ("16B", 16),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "4G", "-1", "1e6", "4 GiB 2", "0x10"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="expected one like 4GiB"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["9" * 400 + ".5 TiB", "9" * 5000])
def test_a_size_of_absurdly_many_digits_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="too many digits"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (16 * 2**20, "16 MiB"),
        (1.25 * 2**30, "1.25 GiB"),
        (12.34 * 2**30, "12.3 GiB"),
        (123.4 * 2**30, "123 GiB"),
        (5000 * 2**50, "5000 PiB"),
    ],
)
def test_sizes_are_shown_with_three_digits(size: float, expected: str) -> None:
    assert format_bytes(size) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"), [(12e-6, "12 µs"), (0.0123, "12.3 ms"), (12.3, "12.30 s")]
)
def test_times_are_shown_in_the_unit_that_suits_them(
    seconds: float, expected: str
) -> None:
    assert format_seconds(seconds) == expected
