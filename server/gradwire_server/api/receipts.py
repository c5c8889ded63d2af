"""The messages about a job: Accepted before its operands, Receipt at the end."""

from __future__ import annotations

import time

from gradwire_protocol.v1 import job_pb2
from gradwire_server.api.call_state import CallState
from gradwire_server.backends.host_memory import peak_resident_bytes


def accepted_message(
    call: CallState, direct: job_pb2.DirectAccess | None = None
) -> job_pb2.Accepted:
    """Return the Accepted message, sent before the client sends W.

    Args:
        call: The call, admitted.
        direct: Where the server takes the elements on direct connections.
    """
    accepted = job_pb2.Accepted()
    accepted.CopyFrom(call.accepted)
    accepted.effective_job.job_id = call.job_id
    accepted.reserved_bytes = call.reserved_bytes
    if direct is not None:
        accepted.direct.CopyFrom(direct)
    return accepted


def receipt_message(call: CallState) -> job_pb2.Receipt:
    """Return the Receipt message, sent at the end."""
    progress = call.progress
    return job_pb2.Receipt(
        job_id=call.job_id,
        server_instance=call.accepted.server_instance,
        m=progress.m,
        blocks=progress.blocks,
        bytes_received=progress.bytes_received,
        bytes_sent=progress.bytes_sent,
        queued_seconds=call.queued_s,
        receiving_seconds=call.receiving_s,
        copy_to_device_seconds=progress.times.to_device_s,
        computing_seconds=progress.times.computing_s,
        copy_from_device_seconds=progress.times.from_device_s,
        sending_seconds=call.sending_s,
        total_seconds=time.perf_counter() - call.started,
        device=call.accepted.device,
        peak_memory_bytes=peak_resident_bytes(),
        transport=call.transport,
        applied=call.applied,
    )
