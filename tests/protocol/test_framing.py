"""Framing by hand and the generated classes agree on every input."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gradwire.v1 import gradient_service_pb2 as service_pb2
from gradwire.v1 import job_pb2, matrix_pb2
from gradwire_protocol import framing, limits

from .protobuf_bytes import messages, mutated

INT64 = limits.MAX_INT64
ENVELOPES = [
    pytest.param(
        service_pb2.ComputeStreamRequest,
        framing.decode_request,
        framing.decode_request_slow,
        id="request",
    ),
    pytest.param(
        service_pb2.ComputeStreamResponse,
        framing.decode_response,
        framing.decode_response_slow,
        id="response",
    ),
]

chunk_fields = {
    "matrix": st.integers(1, 127),
    "index": st.integers(0, INT64) | st.sampled_from([0, 127, 128, 2**31, INT64]),
    "payload": st.binary(max_size=300),
    "crc32c": st.none() | st.integers(0, 2**32 - 1),
}


def outcome(decode, message: bytes):
    """What a parser makes of a message, in a form that compares."""
    try:
        decoded = decode(message)
    except framing.FramingError as error:
        return str(error)
    if isinstance(decoded, framing.Chunk):
        payload = decoded.payload
        data = None if payload is None else bytes(payload)
        return decoded.matrix, decoded.index, data, decoded.crc32c
    return decoded


def assert_parsers_agree(message: bytes) -> None:
    assert outcome(framing.decode_request, message) == outcome(
        framing.decode_request_slow, message
    )
    assert outcome(framing.decode_response, message) == outcome(
        framing.decode_response_slow, message
    )


@given(**chunk_fields)
def test_a_chunk_is_written_as_the_generated_class_writes_it(
    matrix, index, payload, crc32c
):
    chunk = matrix_pb2.Chunk(matrix=matrix, index=index, data=payload, crc32c=crc32c)
    written = framing.encode_chunk(matrix, index, payload, crc32c)
    for envelope in (
        service_pb2.ComputeStreamRequest,
        service_pb2.ComputeStreamResponse,
    ):
        assert written == envelope(chunk=chunk).SerializeToString()


@pytest.mark.parametrize("size", [0, 127, 128, 16383, 16384, limits.MAX_PAYLOAD_BYTES])
def test_payloads_of_every_length_of_length_are_written_and_read(size):
    payload = memoryview(bytes(size))
    message = framing.encode_chunk(1, 5, payload, 7)
    expected = service_pb2.ComputeStreamRequest(
        chunk=matrix_pb2.Chunk(matrix=1, index=5, data=bytes(size), crc32c=7)
    )
    assert message == expected.SerializeToString()
    assert framing.decode_request(message) == framing.Chunk(1, 5, payload, 7)


def test_a_payload_of_wider_items_is_measured_in_bytes():
    payload = memoryview(bytes(16)).cast("d")
    written = framing.encode_chunk(1, 0, payload)
    assert written == framing.encode_chunk(1, 0, bytes(16))


@pytest.mark.parametrize(("envelope", "decode", "decode_slow"), ENVELOPES)
@given(**chunk_fields)
def test_a_chunk_is_read_as_it_was_written_and_its_payload_is_not_copied(
    envelope, decode, decode_slow, matrix, index, payload, crc32c
):
    message = framing.encode_chunk(matrix, index, payload, crc32c)
    chunk = decode(message)
    assert chunk == framing.Chunk(matrix, index, memoryview(payload), crc32c)
    assert chunk.payload.obj is message
    assert decode_slow(message) == chunk


@pytest.mark.thorough
@given(messages())
@settings(max_examples=200)
@example(b"")
@example(b"\x12\x00")
@example(b"\x12")
@example(b"\x12\x02\x08\x01")
@example(b"\x12\x04\x08\x01\x7a\x00")
@example(b"\x12\x05\x08\x81\x00\x7a\x00")  # a matrix in two bytes
@example(b"\x12\x84\x00\x08\x01\x7a\x00")  # an envelope's length in two bytes
@example(b"\x12\x05\x08\x01\x7a\x80\x00")  # a payload's length in two bytes
@example(b"\x12\x06\x08\x01\x10\x00\x7a\x00")  # an index of 0, written out
@example(b"\x12\x0f\x08\x01\x10" + b"\xff" * 9 + b"\x01\x7a\x00")  # index -1
@example(b"\x12\x0f\x08\x01\x10" + b"\xff" * 9 + b"\x7f\x7a\x00")  # over 64 bits
@example(b"\x12\x0e\x08\x01\x10" + b"\xff" * 8 + b"\x7f\x7a\x00")  # index 2**63 - 1
@example(b"\x12\xff\xff\xff\xff\x0f\x08\x01\x7a\x00")
@example(b"\x12\x0d\x08\x01\x7a" + b"\xff" * 9 + b"\x01")
@example(b"\x12\x04\x08\x01\x7a\x00\x12\x02\x10\x05")  # split: merges
@example(b"\x12\x04\x08\x01\x7a\x00\x1a\x00")  # the last of a oneof wins
def test_parsers_agree_on_every_form_that_protobuf_allows(message):
    assert_parsers_agree(message)


@pytest.mark.thorough
@given(mutated(messages()))
@settings(max_examples=200)
def test_parsers_agree_on_damaged_messages(message):
    assert_parsers_agree(message)


@given(st.binary(max_size=40) | st.binary(max_size=40).map(b"\x12".__add__))
def test_parsers_agree_on_random_bytes(message):
    assert_parsers_agree(message)


def test_parsers_agree_on_every_change_of_one_byte():
    written = framing.encode_chunk(3, 300, b"payload", 0x01020304)
    for at in range(len(written)):
        assert_parsers_agree(written[:at])
        assert_parsers_agree(written[:at] + written[at + 1 :])
        for byte in range(256):
            assert_parsers_agree(written[:at] + bytes([byte]) + written[at + 1 :])
            assert_parsers_agree(written[:at] + bytes([byte]) + written[at:])


def test_a_chunk_without_payload_or_of_an_unknown_matrix_is_passed_on():
    message = service_pb2.ComputeStreamRequest(
        chunk=matrix_pb2.Chunk(matrix=1000, index=-5)
    ).SerializeToString()
    assert framing.decode_request(message) == framing.Chunk(1000, -5, None)


def test_the_other_requests_are_read_as_they_were_written():
    job = job_pb2.Job(job_id="j", m=0, n=2)
    assert framing.decode_request(framing.encode_job(job)) == job
    assert framing.decode_request(framing.encode_end(7)) == job_pb2.End(m=7)
    assert framing.decode_request(framing.encode_end(0)) == job_pb2.End()


def test_the_other_responses_are_read_as_they_were_written():
    accepted = job_pb2.Accepted(server_instance="s", block_rows=4)
    receipt = job_pb2.Receipt(job_id="j", blocks=3)
    decode = framing.decode_response
    assert decode(framing.encode_accepted(accepted)) == accepted
    assert decode(framing.encode_receipt(receipt)) == receipt
    assert decode(framing.encode_queued(2)) == job_pb2.Queued(jobs_ahead=2)


@pytest.mark.parametrize(("envelope", "decode", "decode_slow"), ENVELOPES)
@pytest.mark.parametrize("message", [b"", b"\xff", b"\x12\x05", b"\x78\x01"])
def test_what_is_no_message_is_refused_by_name(envelope, decode, decode_slow, message):
    with pytest.raises(framing.FramingError, match=r"ComputeStream|holds neither"):
        decode(message)


def test_text_that_is_not_utf8_is_no_message():
    message = framing.encode_job(job_pb2.Job(job_id="j")).replace(b"j", b"\xff")
    with pytest.raises(framing.FramingError):
        framing.decode_request(message)
