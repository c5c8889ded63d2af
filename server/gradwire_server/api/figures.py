"""The figures of a server, collected from its parts."""

from __future__ import annotations

import platform

import grpc

from gradwire_protocol.version import VERSION
from gradwire_server.api.job_service import JobService
from gradwire_server.observability.figures import (
    DataSocketFigures,
    DeviceFigures,
    Figures,
)
from gradwire_server.observability.totals import Totals


def take_figures(service: JobService, totals: Totals) -> Figures:
    """Return the figures of this moment; call it in the event loop's thread.

    Args:
        service: The job service.
        totals: An observer of all calls of the server.
    """
    data = service.data
    return Figures(
        version=VERSION,
        python=platform.python_version(),
        backend=service.backend.name,
        libraries={"grpcio": grpc.__version__, **service.backend.libraries()},
        admission=service.admission.figures(),
        devices=tuple(_devices(service)),
        sessions=service.sessions.figures(),
        regions=service.regions.figures(),
        data_sockets=None if data is None else DataSocketFigures(*data.counts()),
        calls=totals.figures(),
    )


def _devices(service: JobService) -> list[DeviceFigures]:
    found = []
    for position, device in enumerate(service.backend.devices):
        worker = service.workers[position]
        use = service.admission.devices.use(position)
        found.append(
            DeviceFigures(
                index=device.index,
                name=device.name,
                backend=device.backend,
                compute_capability=device.compute_capability,
                running_jobs=use.jobs,
                busy=worker.busy,
                busy_s=worker.busy_s,
                row_blocks=use.row_blocks,
                operations=use.operations,
                held_bytes=use.held_bytes,
                limit_bytes=use.limit_bytes,
            )
        )
    return found
