"""Where a job's matrices lie: in its messages, or all of them in shared memory."""

from __future__ import annotations

from dataclasses import replace

from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.limits import SHARED_ALIGNMENT, SHARED_MEMORY
from gradwire_protocol.matrices import OPERANDS, Matrix
from gradwire_protocol.v1 import job_pb2
from gradwire_server.errors import JobError
from gradwire_server.jobs.header.parse import JobSpec, Place


def read_places(job: job_pb2.Job, spec: JobSpec, features: tuple[str, ...]) -> JobSpec:
    """The job with the places of its matrices, as far as its header shows them.

    Args:
        job: The header.
        spec: What was read of it so far.
        features: What this server offers.

    Raises:
        JobError: Some of the matrices have places and others have none, or
            two of them, of which one is a result, lie in the same bytes.
    """
    matrices = (*spec.operands, *spec.results)
    shared = [matrix for matrix in matrices if _kind(job, matrix) == "shared"]
    if (shared or job.regions) and SHARED_MEMORY not in features:
        path = path_of(shared[0]) if shared else "job.regions"
        raise JobError(
            Reason.OPTION_UNKNOWN,
            f"{path} asks for shared memory, which this server does not allow",
            field=path,
        )
    if not shared:
        if job.regions:
            raise _invalid("job.regions", "is not empty, but no matrix lies in one")
        return spec
    for matrix in matrices:
        if matrix not in shared:
            raise _invalid(
                path_of(matrix),
                f"is inline, but {shared[0].label} lies in shared memory: expected all "
                f"matrices of a job in one or the other",
            )
    if spec.m is None:
        raise JobError(
            Reason.SHAPE_INVALID,
            "job.m is absent: a job in shared memory needs it",
            field="job.m",
        )
    if spec.checksum:
        raise JobError(
            Reason.OPTION_INVALID,
            "job.checksum is CHECKSUM_CRC32C: a job in shared memory has no payloads",
            field="job.checksum",
        )
    tokens = tuple(region.token for region in job.regions)
    if len(set(tokens)) < len(tokens):
        raise _invalid("job.regions", "names a region twice")
    places = {
        matrix: _read_place(job, matrix, regions=len(tokens)) for matrix in matrices
    }
    spec = replace(spec, regions=tokens, places=places)
    _check_overlap(spec)
    return spec


def check_sizes(spec: JobSpec, sizes: list[int]) -> None:
    """Checks that every matrix ends within its region.

    Args:
        spec: A job in shared memory.
        sizes: Bytes of each of its regions.

    Raises:
        JobError: One does not.
    """
    for matrix, place in spec.places.items():
        end = place.offset + spec.whole_bytes(matrix)
        if end > sizes[place.region]:
            raise _invalid(
                f"{path_of(matrix)}.offset_bytes",
                f"is {place.offset}, so {matrix.label} would end at byte {end} of a "
                f"region of {sizes[place.region]}",
            )


def path_of(matrix: Matrix) -> str:
    """Path of the field that says where a matrix lies."""
    kind = "source" if matrix in OPERANDS else "destination"
    return f"job.{matrix.label}.{kind}"


def _kind(job: job_pb2.Job, matrix: Matrix) -> str | None:
    message = getattr(job, matrix.label)
    kind: str | None = message.WhichOneof(path_of(matrix).rpartition(".")[2])
    return kind


def _read_place(job: job_pb2.Job, matrix: Matrix, regions: int) -> Place:
    given = getattr(job, matrix.label).shared
    place = Place(given.region, given.offset_bytes)
    if not 0 <= place.region < regions:
        raise _invalid(
            f"{path_of(matrix)}.region",
            f"is {place.region}, and job.regions has {regions} entries",
        )
    if place.offset < 0 or place.offset % SHARED_ALIGNMENT:
        raise _invalid(
            f"{path_of(matrix)}.offset_bytes",
            f"is {place.offset}: expected a multiple of {SHARED_ALIGNMENT}, at least 0",
        )
    return place


def _check_overlap(spec: JobSpec) -> None:
    taken = list(spec.operands)
    for result in spec.results:
        for other in taken:
            if spec.share_memory(result, other):
                raise _invalid(
                    f"{path_of(result)}.offset_bytes",
                    f"is {spec.places[result].offset}, where {result.label} would "
                    f"share bytes with {other.label}",
                )
        taken.append(result)


def _invalid(path: str, what: str) -> JobError:
    return JobError(Reason.PLACE_INVALID, f"{path} {what}", field=path)
