"""CRC-32C against the examples that RFC 3720, appendix B.4, prints."""

import pytest

from gradwire_protocol import checksum

ISCSI_READ_COMMAND = bytes.fromhex(
    "01c00000 00000000 00000000 00000000"
    "14000000 00000400 00000014 00000018"
    "28000000 00000000 02000000 00000000"
)


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        pytest.param(b"", 0x00000000, id="nothing"),
        pytest.param(bytes(32), 0x8A9136AA, id="zeros"),
        pytest.param(b"\xff" * 32, 0x62A8AB43, id="ones"),
        pytest.param(bytes(range(32)), 0x46DD794E, id="ascending"),
        pytest.param(bytes(range(31, -1, -1)), 0x113FDB5C, id="descending"),
        pytest.param(ISCSI_READ_COMMAND, 0xD9963A56, id="read-command"),
        pytest.param(b"123456789", 0xE3069283, id="check-value"),
    ],
)
def test_known_payloads_have_their_known_checksums(payload, expected):
    assert checksum.crc32c(payload) == expected
    assert checksum.crc32c(memoryview(b"?" + payload)[1:]) == expected


def test_a_process_without_the_library_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(checksum, "_crc32c", None)
    with pytest.raises(RuntimeError, match="google-crc32c"):
        checksum.crc32c(b"")
