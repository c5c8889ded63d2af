"""Headers that many jobs have in common."""

from __future__ import annotations

import pytest

from gradwire.v1 import job_pb2
from gradwire_protocol.error_reasons import Reason
from gradwire_server.backends.numpy.backend import NumpyBackend
from gradwire_server.errors import JobError
from gradwire_server.jobs.header.cache import HeaderCache
from gradwire_server.jobs.header.parse import FEATURES, MAX_HEADER_BYTES


@pytest.fixture
def headers():
    backend = NumpyBackend()
    yield HeaderCache(backend, None, FEATURES, 1 << 20, "here")
    backend.close()


def job(job_id="a", m=3, **options):
    inline = {"inline": job_pb2.InlineSource()}
    return job_pb2.Job(
        job_id=job_id,
        m=m,
        n=4,
        k=5,
        dtype="DTYPE_FLOAT32",
        x=job_pb2.Operand(**inline),
        w=job_pb2.Operand(**inline),
        y=job_pb2.Result(inline=job_pb2.InlineDestination()),
        **options,
    )


def test_jobs_that_differ_in_their_ids_alone_are_read_once(headers):
    first = headers.read(job("a"))
    assert headers.read(job("b")) is first
    assert headers.read(job("a", m=None)) is not first


def test_nothing_of_one_jobs_id_is_told_to_another(headers):
    assert not headers.read(job("a")).announced[0].effective_job.job_id


def test_a_long_header_is_not_kept(headers):
    long = {"required_features": ["checksum-crc32c"] * 60}
    first, second = (headers.read(job(**long)) for _ in range(2))
    assert first is not second
    assert first == second


def test_a_wrong_header_is_refused_every_time(headers):
    for _ in range(2):
        with pytest.raises(JobError, match=r"job\.m is -1") as refused:
            headers.read(job(m=-1))
        assert refused.value.reason is Reason.SHAPE_INVALID


def test_the_id_counts_in_the_size_of_a_header(headers):
    room = MAX_HEADER_BYTES - job("").ByteSize()
    with pytest.raises(JobError, match="a header has at most"):
        headers.read(job("a" * room))
