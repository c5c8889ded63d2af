"""The answer to GetServerInfo."""

from __future__ import annotations

import platform

import grpc

from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.limits import CONTRACT, MAX_PAYLOAD_BYTES
from gradwire_protocol.v1.gradient_service_pb2 import GetServerInfoResponse, Limits
from gradwire_protocol.version import VERSION
from gradwire_server.admission import tenancy
from gradwire_server.api.job_service import JobService
from gradwire_server.backends.device_info import device_message, fingerprint_message


def describe(service: JobService, backend_reason: str) -> GetServerInfoResponse:
    """Return the answer to GetServerInfo.

    Args:
        service: The job service.
        backend_reason: Why its backend was chosen.
    """
    backend, admission = service.backend, service.admission
    tenant = tenancy.current.get()
    limits = admission.limits(tenant)
    accounts = service.sessions.accounts
    return GetServerInfoResponse(
        version=VERSION,
        server_instance=service.instance,
        contract=CONTRACT,
        features=service.features,
        devices=[
            device_message(device, service.settings.device_memory_limit)
            for device in backend.devices
        ],
        backend_reason=backend_reason,
        dtypes=[dtype.proto_name for dtype in Dtype],
        limits=Limits(
            memory_bytes=limits.memory_limit or 0,
            max_jobs=limits.max_jobs or 0,
            max_queue=limits.max_queue or 0,
            max_columns=backend.max_columns,
            max_message_bytes=MAX_PAYLOAD_BYTES,
            idle_timeout_seconds=service.settings.idle_timeout,
            early_bytes=service.early_bytes,
            row_block_bytes=service.row_block_bytes,
            max_keep_bytes=accounts.max_keep_bytes(tenant, len(backend.devices)),
            max_sessions=accounts.max_sessions(tenant),
            max_lease_seconds=service.settings.session_lease_max,
        ),
        draining=admission.draining,
        libraries={
            "python": platform.python_version(),
            "grpcio": grpc.__version__,
            **backend.libraries(),
        },
        fingerprints=[fingerprint_message(device) for device in backend.devices],
        running_jobs=admission.running,
        queued_jobs=admission.waiting,
    )
