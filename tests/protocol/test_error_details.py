"""Error details travel in the form that every gRPC status library reads."""

import pytest
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode
from hypothesis import given
from hypothesis import strategies as st

from gradwire_protocol import error_details
from gradwire_protocol.error_details import ErrorDetails
from gradwire_protocol.error_reasons import Reason

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
texts_by_name = st.dictionaries(texts, texts, max_size=3)


def trailer_of(*parts) -> bytes:
    packed = status_pb2.Status(code=3, message="text")
    for part in parts:
        packed.details.add().Pack(part)
    return packed.SerializeToString()


@given(
    reason=st.sampled_from(Reason),
    fields=texts_by_name,
    metadata=texts_by_name,
    retry_after_ns=st.none() | st.integers(0, 10**15),
    text=texts,
)
def test_details_arrive_as_they_were_sent(
    reason, fields, metadata, retry_after_ns, text
):
    retry_after_s = None if retry_after_ns is None else retry_after_ns / 1e9
    details = ErrorDetails(reason, fields, metadata, retry_after_s)
    ((name, value),) = error_details.encode(reason.status, text, details)
    assert name == "grpc-status-details-bin"
    arrived = error_details.decode(value)
    assert arrived.reason == reason
    assert arrived.fields == fields
    assert arrived.metadata == metadata
    assert arrived.retry_after_s == pytest.approx(retry_after_s, abs=1e-9)


@pytest.mark.parametrize("reason", Reason)
def test_a_stock_status_library_reads_what_is_sent(reason):
    ((_, value),) = error_details.encode(
        reason.status,
        "the text",
        ErrorDetails(reason, {"job.n": "too small"}, {"job_id": "j"}, 1.5),
    )
    packed = status_pb2.Status.FromString(value)
    assert packed.code == reason.status.value[0]
    assert packed.message == "the text"
    by_name = {part.TypeName(): part for part in packed.details}
    info = error_details_pb2.ErrorInfo()
    bad_request = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    for message in (info, bad_request, retry):
        assert by_name.pop(message.DESCRIPTOR.full_name).Unpack(message)
    assert not by_name
    assert (info.reason, info.domain) == (reason.name, "gradwire")
    assert dict(info.metadata) == {"job_id": "j"}
    (violation,) = bad_request.field_violations
    assert (violation.field, violation.description) == ("job.n", "too small")
    assert retry.retry_delay.ToMilliseconds() == 1500


def test_details_that_a_stock_status_library_sent_are_read():
    value = trailer_of(
        error_details_pb2.RetryInfo(
            retry_delay=duration_pb2.Duration(seconds=2, nanos=500_000_000)
        ),
        error_details_pb2.DebugInfo(detail="of no interest"),
        error_details_pb2.ErrorInfo(
            reason="BUSY", domain="gradwire", metadata={"job_id": "j"}
        ),
    )
    assert error_details.decode(value) == ErrorDetails(
        Reason.BUSY, {}, {"job_id": "j"}, 2.5
    )


def test_a_time_to_come_back_is_not_in_the_past():
    delay = duration_pb2.Duration(seconds=-5)
    arrived = error_details.decode(
        trailer_of(error_details_pb2.RetryInfo(retry_delay=delay))
    )
    assert arrived.retry_after_s == 0


def test_only_what_is_known_is_sent():
    ((_, value),) = error_details.encode(StatusCode.INTERNAL, "text", ErrorDetails())
    assert not status_pb2.Status.FromString(value).details
    assert error_details.decode(value) == ErrorDetails()


def test_a_reason_of_another_domain_is_not_taken_for_one_of_ours():
    info = error_details_pb2.ErrorInfo(reason="BUSY", domain="proxy.example")
    assert error_details.decode(trailer_of(info)).reason is None


def test_a_reason_of_a_newer_server_is_none_but_its_metadata_is_kept():
    info = error_details_pb2.ErrorInfo(
        reason="OF_THE_FUTURE", domain="gradwire", metadata={"job_id": "j"}
    )
    assert error_details.decode(trailer_of(info)) == ErrorDetails(
        None, {}, {"job_id": "j"}
    )


def test_a_name_that_only_python_gives_a_reason_is_no_reason():
    info = error_details_pb2.ErrorInfo(reason="__class__", domain="gradwire")
    assert error_details.decode(trailer_of(info)).reason is None


def test_a_damaged_part_leaves_no_details():
    packed = status_pb2.Status()
    packed.details.append(
        any_pb2.Any(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff")
    )
    assert error_details.decode(packed.SerializeToString()) == ErrorDetails()


@given(st.binary(max_size=64))
def test_a_damaged_trailer_is_no_second_error(value):
    assert isinstance(error_details.decode(value), ErrorDetails)
