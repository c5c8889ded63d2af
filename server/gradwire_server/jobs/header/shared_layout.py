"""Check that a job's matrices fit into their shared regions."""

from __future__ import annotations

from collections.abc import Sequence

from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.header_checks import path_of
from gradwire_protocol.job_spec import JobSpec
from gradwire_server.errors import JobError


def check_region_sizes(spec: JobSpec, sizes_bytes: Sequence[int]) -> None:
    """Check that every matrix ends within its region.

    Args:
        spec: A job in shared memory.
        sizes_bytes: Size of each of its regions.

    Raises:
        JobError: A matrix does not end within its region.
    """
    for matrix, buffer in spec.buffers.items():
        end = buffer.offset + spec.size_bytes(matrix)
        if end > sizes_bytes[buffer.region]:
            path = f"{path_of(matrix)}.offset_bytes"
            raise JobError(
                Reason.BUFFER_REF_INVALID,
                f"{path} is {buffer.offset}, so {matrix.label} would end at byte "
                f"{end} of a region of {sizes_bytes[buffer.region]}",
                field=path,
            )
