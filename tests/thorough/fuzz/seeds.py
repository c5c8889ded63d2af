"""Writes the inputs that fuzzing begins with: `python -m tests.thorough.fuzz.seeds`.

Good ones of every kind, from which mutations lead everywhere else.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

import google_crc32c
import ml_dtypes
import numpy as np
from grpc import StatusCode

from gradwire.v1 import gradient_service_pb2 as service_pb2
from gradwire.v1 import job_pb2, matrix_pb2
from gradwire.v1 import session_service_pb2 as pb2
from gradwire_protocol import error_details as codec
from gradwire_protocol import framing
from gradwire_protocol.error_reasons import Reason
from gradwire_server.auth.tokens import Entry, sha256_of
from tests.support.direct_client import COMPLETE, ELEMENTS, frame
from tests.support.raw import (
    DTYPES,
    INLINE,
    NEEDS,
    Problem,
    Request,
    chunk,
    end,
    whole_numbers,
)
from tests.support.sessions import (
    GRADIENT,
    chunks,
    into,
    kept,
    sent_and_kept,
    sgd,
)
from tests.support.sessions import header as tensor_header
from tests.thorough.fuzz import credentials
from tests.thorough.fuzz.answers import conversation
from tests.thorough.fuzz.containers import Ending, Method, container
from tests.thorough.fuzz.direct import job_of
from tests.thorough.fuzz.sessions import CANCELS, CONTINUES, Call, encoded
from tests.thorough.fuzz.streams import ANY_SERVER, ROW_BLOCK_BYTES
from tests.thorough.fuzz.targets import CORPUS

Seeds = Iterator[tuple[str, bytes]]
BLOCK_ROWS = 8
"""Of jobs of 3 and 2 columns of float32 on the server that is fuzzed."""


def streams() -> Seeds:
    for dtype in DTYPES:
        yield dtype, container(stream(whole_numbers(20, 4, 3, dtype)))
    for result in NEEDS:
        yield result, container(stream(whole_numbers(20, 4, 3, results=(result,))))
    some, long = whole_numbers(12, 3, 2), whole_numbers(5 * BLOCK_ROWS, 3, 2)
    for name, shape in (("no-rows", (0, 3, 2)), ("no-columns", (5, 0, 2))):
        yield name, container(stream(whole_numbers(*shape)))
    yield "open-m", container(stream(some, open_m=True))
    yield "checksums", container(stream(some, checksum=1))
    yield "small-results", container(stream(some, max_chunk_bytes=16))
    before = {"library": "numpy", "block_rows": 4, "segment_rows": 4}
    going_on = {"fingerprint": before, "first_row": 4, "results_from_row": 8}
    yield "resume", container(stream(some, resume=going_on))
    checkpoints = job_pb2.Checkpoints(rows=1)
    yield "checkpoints", container(stream(long, checkpoints=checkpoints))
    segments = job_pb2.Numerics(dw_segment_rows=4 * BLOCK_ROWS)
    yield "segments", container(stream(long, numerics=segments))
    by_segment = {"numerics": job_pb2.Numerics(dw_segment_rows=4), "segment_sums": True}
    yield "segment-sums", container(stream(some, **by_segment))
    yield "resumed", container(resumed(long, 2 * BLOCK_ROWS))
    yield "silence", container(stream(some)[:4], ending=Ending.SILENCE)
    yield "cancel", container(stream(some)[:4], ending=Ending.CANCEL)
    yield "nothing", container([])
    compute = some.compute_request().SerializeToString()
    yield "compute", container([compute], Method.COMPUTE)
    region = service_pb2.OpenRegionRequest(size_bytes=4096).SerializeToString()
    yield "region", container([region], Method.REGION)


def direct_connections() -> Seeds:
    for choice in (0, 1, 2, 3, 4, 8, 12, 18, 34, 50):
        problem, options = job_of(choice)
        shares = [direct_share(problem, number, options) for number in range(2)]
        by_turns = [
            bytes([number]) + share[at]
            for at in range(max(map(len, shares)))
            for number, share in enumerate(shares)
            if at < len(share)
        ]
        yield f"job-{choice}", container([bytes([choice]), *by_turns])
        yield f"part-{choice}", container([bytes([choice]), *by_turns[:3]])
    yield "nothing", container([])
    yield "silence", container([b"\0", *by_turns[:2]], ending=Ending.SILENCE)
    yield "cancel", container([b"\0", *by_turns[:2]], ending=Ending.CANCEL)


def direct_share(
    problem: Problem, number: int, options: Mapping[str, int | bool]
) -> list[bytes]:
    """The frames of one of two connections."""
    m, n, k = problem.shape
    frames = []

    def elements(name: str, first: int, last: int) -> None:
        array = getattr(problem, name)
        payload = array[first:last].tobytes()
        crc = google_crc32c.value(payload) if options["checksum"] else None
        index = first * array.shape[1]
        frames.append(frame(ELEMENTS, name, index, payload, crc=crc))

    if not number and "w" in problem.operands:
        elements("w", 0, n)
    rows = rows_of_a_block(n, k, problem.x.itemsize)
    for first in range(number * rows, m, 2 * rows):
        for name in ("x", "dy"):
            if name in problem.operands:
                elements(name, first, min(m, first + rows))
    return [*frames, frame(COMPLETE, 0, m)]


def rows_of_a_block(n: int, k: int, itemsize: int) -> int:
    """The largest power of two of rows that fits the block of the fuzzed server."""
    rows = max(1, ROW_BLOCK_BYTES // ((n + k) * itemsize))
    return int(1 << (rows.bit_length() - 1))


def stream(problem: Problem, **options: object) -> list[bytes]:
    """The messages of a job, in small chunks."""
    messages = [Request(job=problem.job(**options)), *problem.body(4, 64)]
    for message in messages:
        if options.get("checksum") and message.HasField("chunk"):
            message.chunk.crc32c = google_crc32c.value(message.chunk.data)
    return [message.SerializeToString() for message in messages]


def resumed(problem: Problem, first_row: int) -> list[bytes]:
    """The messages of a job that goes on, with a sum of dW that is all ones."""
    _, n, k = problem.shape
    job = problem.job(required_features=["resume"])
    job.resume.first_row = job.resume.results_from_row = first_row
    job.resume.fingerprint.library = ANY_SERVER
    job.resume.dw_sum.CopyFrom(INLINE)
    w = list(problem.chunks("w", 0, n))
    dw_sum = chunk(matrix_pb2.MATRIX_DW_SUM, 0, np.ones(n * k, np.float64).tobytes())
    rows = [
        message
        for row in range(first_row, problem.shape[0], 4)
        for name in ("x", "dy")
        for message in problem.chunks(name, row, min(row + 4, problem.shape[0]))
    ]
    messages = [Request(job=job), *w, dw_sum, *rows, end(problem.shape[0])]
    return [message.SerializeToString() for message in messages]


def sessions() -> Seeds:
    problem = whole_numbers(6, 3, 2)
    opened = [
        encoded(Call.OPEN, pb2.OpenSessionRequest(keep_bytes=600)),
        *put(1, problem.w),
        *put(2, np.zeros_like(problem.w), role=GRADIENT, zeros=True),
    ]
    forward = encoded(
        Call.COMPUTE,
        service_pb2.ComputeRequest(
            job=Problem(problem.x, problem.w, problem.dy, ("y",)).job(
                session=SESSION, x=sent_and_kept(3), w=kept(1)
            ),
            x=problem.x.tobytes(),
        ),
    )
    sums = Problem(problem.x, problem.w, problem.dy, ("dx", "dw"))
    fields = {"session": SESSION, "x": kept(3, last_use=True), "w": kept(1)}
    backward = encoded(
        Call.COMPUTE,
        service_pb2.ComputeRequest(
            job=sums.job(dw=into(2, 0), **fields), dy=problem.dy.tobytes()
        ),
    )
    adam = pb2.Adam(lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8)
    steps = [
        encoded(Call.STEP, pb2.StepRequest(session="s1", step=1, groups=[group]))
        for group in (
            sgd((1, 2)),
            sgd((1, 2), momentum=0.9),
            pb2.ParameterGroup(
                parameters=[pb2.Parameter(weight=1, gradient=2)], adam=adam
            ),
        )
    ]
    look = [
        encoded(Call.RENEW, pb2.RenewSessionRequest(session="s1")),
        encoded(Call.DESCRIBE, pb2.DescribeSessionRequest(session="s1")),
        encoded(Call.LIST, pb2.ListSessionsRequest()),
        encoded(Call.GET, pb2.GetTensorRequest(session="s1", tensor=1)),
    ]
    yield "training", container([*opened, forward, backward, steps[0], forward])
    yield (
        "repeated",
        container([*opened, forward, forward, backward, backward, steps[1], steps[1]]),
    )
    yield "adam", container([*opened, forward, backward, steps[2], *look])
    yield "look", container([*opened, *look])
    streamed = [
        each.SerializeToString()
        for each in (
            Request(job=sums.job(session=SESSION, x=sent_and_kept(3), dw=into(2, 1))),
            *problem.body(4, 64),
        )
    ]
    stream = [
        bytes([Call.STREAM + CONTINUES * bool(index)]) + each
        for index, each in enumerate(streamed)
    ]
    yield "streamed", container([*opened, *stream, backward, steps[0]])
    cut = [bytes([stream[0][0] | CANCELS]) + stream[0][1:], *stream[1:3]]
    yield "cancelled", container([*opened, *cut, forward])
    state = put(1, np.ones_like(problem.w), state="exp_avg", updates=3)
    drop = encoded(Call.DROP, pb2.DropTensorsRequest(session="s1", tensors=[2, 9]))
    yield "states", container([*opened, *state, *look, drop])
    copies = put(1, problem.w, compute_dtype=matrix_pb2.DTYPE_BFLOAT16)
    yield "checksums", container([*opened, *copies, *put(4, problem.x, checksum=1)])
    save = encoded(Call.SAVE, pb2.SaveSessionRequest(session="s1", name="saved"))
    restore = pb2.OpenSessionRequest(
        keep_bytes=600, restore="saved", save_name="saved", save_every_steps=1
    )
    close = encoded(Call.CLOSE, pb2.CloseSessionRequest(session="s1"))
    again = encoded(
        Call.STEP, pb2.StepRequest(session="s2", step=1, groups=[sgd((1, 2))])
    )
    yield (
        "saved",
        container(
            [
                *opened,
                forward,
                backward,
                save,
                encoded(Call.OPEN, restore),
                again,
                close,
            ]
        ),
    )


SESSION = job_pb2.SessionRef(session="s1")


def put(tensor: int, array: np.ndarray, **fields: Any) -> list[bytes]:
    """The messages of PutTensor in the first session."""
    first = tensor_header(array, session="s1", tensor=tensor, **fields)
    rest = [] if fields.get("zeros") else list(chunks(array, 40))
    for each in rest:
        if fields.get("checksum"):
            each.chunk.crc32c = google_crc32c.value(each.chunk.data)
    return [
        encoded(Call.PUT, pb2.PutTensorRequest(header=first)),
        *(encoded(Call.PUT, each, CONTINUES) for each in rest),
    ]


def answers() -> Seeds:
    yield "good", container(conversation())
    yield "checkpoint", container(conversation(checkpoint=True))


def framings() -> Seeds:
    for name, payload in (("empty", b""), ("short", b"payload"), ("long", bytes(200))):
        yield name, framing.encode_chunk(3, 300, payload, 0x01020304)
    yield "end", framing.encode_end(7)
    yield "job", framing.encode_job(whole_numbers(1, 2, 3).job())
    for number, message in enumerate(conversation()):
        yield f"answer-{number}", message


def error_details() -> Seeds:
    details = codec.ErrorDetails(Reason.BUSY, {"job.m": "is -1"}, {"job_id": "j"}, 1.5)
    for name, part in (
        ("all", details),
        ("none", codec.ErrorDetails()),
        ("reason", dataclasses.replace(details, fields={}, retry_after_s=None)),
    ):
        ((_, trailer),) = codec.encode(StatusCode.RESOURCE_EXHAUSTED, "busy", part)
        yield name, trailer


def npy_files() -> Seeds:
    matrix = np.arange(6).reshape(2, 3)
    for version in ((1, 0), (2, 0), (3, 0)):
        for dtype in ("<f2", ">f4", "<f8", ml_dtypes.bfloat16):
            file = io.BytesIO()
            array = np.asfortranarray(matrix.astype(dtype))
            np.lib.format.write_array(file, array, version=version)
            yield f"{version[0]}-{array.dtype.name}", file.getvalue()


def settings_files() -> Seeds:
    yield "sizes", b'memory-limit = "3GiB"\nrow_block_bytes = "1.5 MiB"\nmax-jobs = 7\n'
    yield "lists", b'listen = ["127.0.0.1:1", "unix:x"]\ndevices = [0, 2]\n'
    yield "numbers", b"grace = 0\nidle-timeout = 2.5\nallow-shared-memory = true\n"
    yield "table", b'[server]\nlog_format = "json"\n'


def token_files() -> Seeds:
    today = datetime.date(2026, 11, 26)
    entries = [Entry(name, sha256_of(name), today) for name in ("alice", "bob")]
    yield "two", "".join(entry.toml() for entry in entries).encode()
    yield "none", b"tokens = []\n"


def key_files() -> Seeds:
    for kind, key in credentials.PUBLIC_KEYS.items():
        yield kind, json.dumps({"keys": [key]}).encode()


def jwts() -> Seeds:
    for name, header, claims in (
        ("good", {"alg": "EdDSA", "kid": "ed"}, {"aud": "a", "iss": "i", "sub": "x"}),
        ("hmac", {"alg": "HS256", "kid": "ed"}, {"aud": "a", "iss": "i", "sub": "x"}),
        ("none", {"alg": "none"}, {}),
    ):
        parts = (json.dumps(header), json.dumps(claims), "x" * 64)
        yield name, b".".join(base64.urlsafe_b64encode(p.encode()) for p in parts)


def main() -> None:
    for name, seeds in (
        ("streams", streams()),
        ("direct", direct_connections()),
        ("sessions", sessions()),
        ("answers", answers()),
        ("framing", framings()),
        ("error-details", error_details()),
        ("npy", npy_files()),
        ("settings", settings_files()),
        ("tokens", token_files()),
        ("keys", key_files()),
        ("jwts", jwts()),
    ):
        (CORPUS / name).mkdir(parents=True, exist_ok=True)
        for seed, data in seeds:
            (CORPUS / name / seed).write_bytes(data)


if __name__ == "__main__":
    main()
