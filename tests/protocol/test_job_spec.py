"""A job's header: what is written is read again, and nothing of it is lost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwire.v1 import job_pb2
from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.header_checks import HeaderError
from gradwire_protocol.job_spec import (
    BufferRef,
    Contribution,
    Fingerprint,
    JobSpec,
    KeptOperand,
    KeptResult,
    Resume,
)
from gradwire_protocol.matrices import RESULTS, SUMS, Matrix, operands_for

SIZES = st.integers(0, 1000)
POWERS = st.integers(0, 62).map(lambda bit: 1 << bit)
TEXTS = st.text(max_size=8)
FINGERPRINTS = st.builds(Fingerprint, TEXTS, TEXTS, SIZES, SIZES, SIZES)


@st.composite
def kept(draw: Any, wanted: set[Matrix]) -> dict[str, Any]:
    """The fields of a job with kept tensors, or none."""
    if not draw(st.booleans()):
        return {}
    operands = {
        each: draw(st.sampled_from(["sent", "kept", "keep"]))
        for each in operands_for(wanted)
    }
    if operands.get(Matrix.W) == "keep":
        operands[Matrix.W] = "kept"
    part = st.builds(Contribution, SIZES, st.just(3), st.just(0) | st.integers(4, 9))
    result = st.builds(KeptResult, st.integers(10, 99), st.none() | part)
    numbers = {each: draw(st.integers(1, 3)) + 3 * i for i, each in enumerate(operands)}
    fields: dict[str, Any] = {
        "kept": {
            each: KeptOperand(numbers[each], draw(st.booleans()))
            for each, how in operands.items()
            if how == "kept"
        },
        "keep": {
            each: numbers[each] for each, how in operands.items() if how == "keep"
        },
        "into": {
            each: draw(result)
            for each in SUMS
            if each in wanted and draw(st.booleans())
        },
    }
    if len({each.tensor for each in fields["into"].values()}) < len(fields["into"]):
        fields["into"] = {}
    if not any(fields.values()):
        return {}
    session = {"session": "secret", "session_step": draw(st.none() | SIZES)}
    return fields | session


@st.composite
def specs(draw: Any) -> JobSpec:
    """Any job that a header can ask for."""
    dtype = draw(st.sampled_from(Dtype))
    wanted = draw(st.sets(st.sampled_from(RESULTS), min_size=1))
    of_session = draw(kept(wanted))
    in_memory = {*of_session.get("kept", ()), *of_session.get("into", ())}
    sent = {*operands_for(wanted), *wanted} - in_memory
    shared = draw(st.booleans()) and bool(sent)
    m = draw(SIZES if shared or of_session else st.none() | SIZES)
    of_dw = Matrix.DW in wanted and not shared and not of_session
    first = draw(st.integers(0, 1000 if m is None else m))
    resume = st.builds(Resume, st.just(first), st.integers(first, 2000), FINGERPRINTS)
    matrices = [
        each
        for each in (*operands_for(wanted), *(r for r in RESULTS if r in wanted))
        if each in sent
    ]
    sums = {Matrix.DW, Matrix.DB} & wanted
    by_segment = bool(sums) and not shared and not of_session and draw(st.booleans())
    if by_segment:
        of_dw, resume = False, st.none()
    accumulators = [d for d in Dtype if d.itemsize >= dtype.sums_in.itemsize]
    return JobSpec(
        m=m,
        n=draw(SIZES),
        k=draw(SIZES),
        dtype=dtype,
        results={r: draw(st.sampled_from(Dtype)) for r in RESULTS if r in wanted},
        dw_accumulator=draw(st.none() | st.sampled_from(accumulators)),
        allow_tf32=draw(st.booleans()),
        checksum=draw(st.booleans()) and not shared,
        max_chunk_bytes=draw(st.integers(1, 4 << 20)),
        features=draw(st.lists(TEXTS, unique=True, max_size=3).map(tuple)),
        # Each matrix in a region of its own: none may overlap with a result.
        regions=tuple(f"region {each.label}" for each in matrices) if shared else (),
        buffers={
            matrix: BufferRef(number, 64 * draw(SIZES))
            for number, matrix in enumerate(matrices)
        }
        if shared
        else {},
        checkpoint_rows=draw(st.none() | SIZES) if of_dw else None,
        resume=None if shared or of_session else draw(st.none() | resume),
        block_rows=draw(st.none() | POWERS),
        segment_rows=draw(POWERS if by_segment else st.none() | POWERS),
        segment_sums=by_segment,
        **of_session,
    )


@settings(max_examples=50)
@given(specs(), TEXTS)
def test_what_is_written_is_read_again(spec: JobSpec, job_id: str) -> None:
    message = spec.to_message(job_id)
    assert message.job_id == job_id
    arrived = job_pb2.Job.FromString(message.SerializeToString())
    assert JobSpec.from_message(arrived) == spec


@given(specs())
def test_every_field_of_a_header_is_of_the_spec(spec: JobSpec) -> None:
    """A field that is written and not read, or the other way round, would be lost."""
    again = JobSpec.from_message(spec.to_message()).to_message()
    assert again == spec.to_message()


def test_every_field_of_the_contract_is_written() -> None:
    fingerprint = Fingerprint("library", "device", 3, 4, 4)
    everything = JobSpec(
        m=8,
        n=1,
        k=2,
        dtype=Dtype.FLOAT32,
        results=dict.fromkeys(RESULTS, Dtype.FLOAT64),
        dw_accumulator=Dtype.FLOAT64,
        allow_tf32=True,
        checksum=True,
        features=("resume",),
        checkpoint_rows=4,
        resume=Resume(4, 8, fingerprint),
        block_rows=4,
        direct=2,
    )
    in_regions = JobSpec(
        m=8,
        n=1,
        k=2,
        dtype=Dtype.FLOAT32,
        results={Matrix.Y: Dtype.FLOAT32},
        regions=("token",),
        buffers=dict.fromkeys((Matrix.X, Matrix.W, Matrix.Y), BufferRef(0, 64)),
    )
    in_session = JobSpec(
        m=8,
        n=1,
        k=2,
        dtype=Dtype.FLOAT32,
        results={Matrix.Y: Dtype.FLOAT32},
        session="name",
        kept={Matrix.W: KeptOperand(1)},
    )
    in_segments = JobSpec(
        m=8,
        n=1,
        k=2,
        dtype=Dtype.FLOAT32,
        results={Matrix.DW: Dtype.FLOAT32},
        segment_rows=4,
        segment_sums=True,
    )
    written = {
        field.name
        for spec in (everything, in_regions, in_session, in_segments)
        for field, _ in spec.to_message("name").ListFields()
    }
    assert written == set(job_pb2.Job.DESCRIPTOR.fields_by_name)


def test_a_job_with_segment_sums_sends_no_other_sums() -> None:
    spec = JobSpec(
        m=8,
        n=1,
        k=2,
        dtype=Dtype.FLOAT32,
        results=dict.fromkeys(RESULTS, Dtype.FLOAT32),
        segment_rows=4,
    )
    assert spec.sent_results == RESULTS
    by_segment = replace(spec, segment_sums=True)
    assert by_segment.sent_results == (Matrix.Y, Matrix.DX)


def test_no_sums_of_segments_are_written_to_shared_memory() -> None:
    matrices = (Matrix.X, Matrix.DY, Matrix.DW)
    spec = JobSpec(
        m=8,
        n=1,
        k=2,
        dtype=Dtype.FLOAT32,
        results={Matrix.DW: Dtype.FLOAT32},
        regions=tuple(map(str, matrices)),
        buffers={each: BufferRef(at, 0) for at, each in enumerate(matrices)},
        segment_rows=4,
    )
    assert JobSpec.from_message(spec.to_message()) == spec
    with pytest.raises(HeaderError, match="in shared memory") as caught:
        JobSpec.from_message(replace(spec, segment_sums=True).to_message())
    assert caught.value.reason is Reason.OPTION_INVALID
    assert caught.value.field == "job.segment_sums"


@pytest.mark.parametrize(
    ("change", "reason", "field"),
    [
        ({"n": -1}, Reason.SHAPE_INVALID, "job.n"),
        ({"n": 1 << 40, "k": 1 << 40}, Reason.SHAPE_OVERFLOW, "job.n"),
        ({"dtype": 9}, Reason.DTYPE_INVALID, "job.dtype"),
        ({"max_chunk_bytes": 5 << 20}, Reason.OPTION_INVALID, "job.max_chunk_bytes"),
        ({"block_rows": 48}, Reason.OPTION_INVALID, "job.block_rows"),
        ({"block_rows": -64}, Reason.OPTION_INVALID, "job.block_rows"),
        ({"block_rows": -(1 << 63)}, Reason.OPTION_INVALID, "job.block_rows"),
        *(
            (
                {"numerics": {"dw_segment_rows": rows}},
                Reason.OPTION_INVALID,
                "job.numerics.dw_segment_rows",
            )
            for rows in (-(1 << 63), -2, 3, (1 << 62) + 1)
        ),
    ],
)
def test_what_no_server_can_take_names_its_field(
    change: dict[str, Any], reason: Reason, field: str
) -> None:
    header = JobSpec(
        m=1, n=2, k=3, dtype=Dtype.FLOAT32, results={Matrix.Y: Dtype.FLOAT32}
    ).to_message()
    header.MergeFrom(job_pb2.Job(**change))
    with pytest.raises(HeaderError) as caught:
        JobSpec.from_message(header)
    assert caught.value.reason is reason
    assert caught.value.field == field
