"""The life of a server: bind, serve, drain, close."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import grpc

from gradwire_protocol.limits import MAX_MESSAGE_BYTES
from gradwire_server.admission.controller import CALL_BYTES, Admission
from gradwire_server.api.gradient_servicer import GradientServicer
from gradwire_server.api.job_service import JobService
from gradwire_server.api.open_calls import OpenCalls
from gradwire_server.api.session_servicer import SessionServicer
from gradwire_server.api.side_listeners import SideListeners
from gradwire_server.api.standard import health
from gradwire_server.api.standard.guard import StandardServiceGuard
from gradwire_server.api.standard.unknown_contracts import OtherContracts
from gradwire_server.auth import make_auth_interceptor
from gradwire_server.backends import select
from gradwire_server.backends.base import Backend, DeviceInfo, DeviceLostError
from gradwire_server.backends.device_info import label, memory_limit
from gradwire_server.backends.host_limits import memory_bytes
from gradwire_server.backends.host_memory import tune_malloc
from gradwire_server.errors import BackendError
from gradwire_server.observability.access_log import AccessLog
from gradwire_server.observability.calls import Observers
from gradwire_server.observability.grpc_log import keep_departures_from_log
from gradwire_server.observability.timeline import Observe, no_observer
from gradwire_server.observability.tracing import Tracing
from gradwire_server.scheduling.device_selector import DeviceSelector
from gradwire_server.sessions import drain
from gradwire_server.settings import Settings
from gradwire_server.transports import listener
from gradwire_server.transports.data_plane import DataListener, make_data_listener
from gradwire_server.transports.lasting_server import LastingServer
from gradwire_server.transports.tls import Certificates

_log = logging.getLogger("gradwire_server")

_CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    # A taken port is an error, not a second server behind the same address.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A call's receive window, as counted by admission. With bandwidth probing
    # the window grows to several MiB per call: 200 waiting clients would fill
    # a GiB.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", CALL_BYTES),
    # NATs and load balancers drop connections after minutes of silence, and a
    # computation may take as long.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
)


class Server:
    """A gradwire server in the running event loop.

    Args:
        settings: The operator's settings.
        backend: The backend; by default the settings choose it.
        observe: Called when row blocks are received, computed and sent.

    Raises:
        BackendError: The backend cannot be used here; the text gives the cause.
        CredentialsError: A file with credentials cannot be used.
        TracesError: Traces cannot be sent.
    """

    def __init__(
        self,
        settings: Settings,
        backend: Backend | None = None,
        observe: Observe = no_observer,
    ) -> None:
        self.settings = settings
        self._observe = observe
        self._health = health.Health()
        self._beside = SideListeners(settings, self._health)
        self._tracing = Tracing(otlp=settings.traces)
        # Tracing comes first: it gives a call the ids that its log lines have.
        every = (self._tracing.observer, AccessLog(), self._beside.totals)
        self._call_observer = Observers(each for each in every if each is not None)
        self._gate = make_auth_interceptor(settings, self._call_observer)
        self.addresses: tuple[str, ...] = ()
        """Addresses for clients, once the server has started."""
        if backend is None:
            backend, self.backend_reason = select.choose(settings)
        else:
            self.backend_reason = "as given"
        self.backend_name = backend.name
        self._backend = backend
        self._service: JobService | None = None
        self._calls = OpenCalls()
        self._lost = asyncio.Event()
        self.lost: str | None = None
        """The device that failed for good, and the cause; None before. The process is
        then no longer usable, and should end."""
        self._grpc: LastingServer | None = None
        self._data: DataListener | None = None

    @property
    def metrics_url(self) -> str | None:
        """URL of the metrics, once the server has started; None: it serves none."""
        return self._beside.metrics_url

    @property
    def health_address(self) -> str | None:
        """Address for health probes alone, once the server has started, or None."""
        return self._beside.health_address

    @property
    def instance(self) -> str:
        """The server process: a random name; empty before the server has started."""
        return "" if self._service is None else self._service.instance

    @property
    def running_jobs(self) -> int:
        """Jobs that run now, of all tenants."""
        return 0 if self._service is None else self._service.admission.running

    @property
    def queued_jobs(self) -> int:
        """Jobs that wait for their turn now, of all tenants."""
        return 0 if self._service is None else self._service.admission.waiting

    async def start(self) -> None:
        """Listen on every address and serve.

        Raises:
            ListenError: An address cannot be listened on; the server then listens on
                none.
            StateDirectoryError: The directory for saved states cannot be used.
            BackendError: A device cannot be used.
        """
        if self.settings.keep_memory:
            tune_malloc()
        keep_departures_from_log()
        limit = self.settings.memory_limit
        admission = Admission(
            memory_limit=memory_bytes() // 2 if limit is None else limit,
            max_jobs=self.settings.max_jobs,
            max_queue=self.settings.max_queue,
            limits_of=None if self._gate is None else self._gate.limits_of,
            devices=DeviceSelector(
                [
                    memory_limit(device, self.settings.device_memory_limit)
                    for device in self._backend.devices
                ]
            ),
        )
        tls = None if self.settings.tls_cert is None else Certificates(self.settings)
        self._data = make_data_listener(self.settings, tls)
        server = self._new_server()
        bound: list[str] = []
        try:
            for address in self.settings.listen:
                bound.append(self._bind(server, address, tls))  # noqa: PERF401 - undone below
            if self._data is not None:
                await self._data.start()
            await self._beside.start()
            service = await self._started(admission)
        except (OSError, BackendError):
            await server.stop(None)
            await self._close_data()
            await self._beside.close()
            await self._tracing.close()
            for address in bound:
                listener.remove(address)
            raise
        self._service = service
        self._beside.serve(service)
        self._add_handlers(server, service)
        self.addresses = tuple(bound)

        async def again() -> grpc.aio.Server:
            another = self._new_server()
            for address in self.addresses:
                await listener.wait_closed(address)
                self._bind(another, address, tls)
            self._add_handlers(another, service)
            return another

        self._grpc = LastingServer(server, again)
        await self._grpc.start()
        self._health.serving()
        _log.info(
            "serving",
            extra={
                "addresses": " ".join(self.addresses),
                **({} if self._data is None else {"data": " ".join(self._data.bound)}),
                **{
                    name: str(value)
                    for name in ("data_advertise", "state_dir")
                    if (value := getattr(self.settings, name)) is not None
                },
                **self._beside.addresses(),
                **self._tracing.addresses(),
                "tls": "none" if tls is None else "mutual" if tls.mutual else "server",
                "backend": self.backend_name,
                "memory_limit": admission.memory_limit,
                "authentication": self._gate is not None,
                "server_instance": service.instance,
            },
        )

    async def wait_lost(self) -> None:
        """Wait until a device has failed for good (see `lost`).

        Health then reports NOT_SERVING, new jobs are refused and running jobs are
        cancelled.
        """
        await self._lost.wait()

    async def drain(self) -> None:
        """Stop gracefully.

        Health reports NOT_SERVING, new jobs are refused, and running jobs have the
        grace period to finish. After it a job ends with a checkpoint if its client
        takes checkpoints; otherwise it is cancelled. Sessions with saved steps are
        saved; the others have the grace period to be fetched and closed. Then the
        server closes. If this call is cancelled, the server stops at once.
        """
        if self._service is None:
            return
        saving: asyncio.Task[None] | None = None
        try:
            self._health.not_serving()
            service = self._service
            service.admission.drain()
            _log.info(
                "draining",
                extra={
                    "running_jobs": service.admission.running,
                    "sessions": len(service.sessions),
                },
            )
            if service.states is not None:
                saving = asyncio.create_task(
                    drain.save(service.sessions, service.states, service.worker_of)
                )
            try:
                async with asyncio.timeout(self.settings.grace):
                    await service.admission.wait_idle()
                    if saving is not None:
                        await asyncio.shield(saving)
                    await drain.wait_closed(service.sessions)
            except TimeoutError:
                await self._hand_over(service)
                if saving is not None:  # perhaps only the jobs' end lets it begin
                    await asyncio.wait([saving], timeout=_HAND_OVER_S)
        finally:
            if saving is not None:
                saving.cancel()
                await asyncio.wait([saving])
            await self.stop()

    async def _hand_over(self, service: JobService) -> None:
        service.hand_over_running_jobs()
        try:
            async with asyncio.timeout(_HAND_OVER_S):
                await service.admission.wait_idle()
        except TimeoutError:
            service.end_running_jobs()
            await service.admission.wait_idle()

    async def stop(self) -> None:
        """Close the listeners and end all open calls.

        It finishes even if the caller is cancelled meanwhile, as `drain` is by a second
        signal: there is nothing left that could be faster.
        """
        server, self._grpc = self._grpc, None
        if server is None:
            return
        closing = asyncio.create_task(self._close(server))
        try:
            await asyncio.shield(closing)
        except asyncio.CancelledError:
            await closing
            raise

    async def _close(self, server: LastingServer) -> None:
        # A call that has just ended may still have its status to send.
        await server.stop(_FLUSH_S)
        await self._calls.wait_ended(_UNWIND_S)
        await self._close_data()
        self._call_observer.close()
        if self._service is not None:
            await self._service.sessions.steps_made()
            self._service.close()
        for address in self.addresses:
            listener.remove(address)
        await self._beside.close()
        await self._tracing.close()
        _log.info("stopped")

    async def _close_data(self) -> None:
        if self._data is not None:
            await self._data.close()

    def _new_server(self) -> grpc.aio.Server:
        return grpc.aio.server(
            interceptors=[
                self._calls,
                *filter(None, [self._gate]),
                StandardServiceGuard(),
            ],
            options=_CHANNEL_OPTIONS,
        )

    def _add_handlers(self, server: grpc.aio.Server, service: JobService) -> None:
        servicer = GradientServicer(service, self.backend_reason)
        sessions = SessionServicer(service)
        server.add_generic_rpc_handlers(
            (servicer.handler(), sessions.handler(), OtherContracts())
        )
        health.add(server, self._health)

    def _bind(
        self, server: grpc.aio.Server, address: str, tls: Certificates | None
    ) -> str:
        credentials = None if tls is None else tls.credentials()
        insecure = self.settings.insecure
        return listener.bind(server, address, credentials, insecure=insecure)

    async def _started(self, admission: Admission) -> JobService:
        service = JobService(
            self.settings,
            self._backend,
            admission,
            self._device_lost,
            call_observer=self._call_observer,
            observe=self._observe,
            data=self._data,
        )
        try:
            await service.ready()
        except BackendError:
            service.close()
            raise
        return service

    async def _device_lost(self, device: DeviceInfo, error: DeviceLostError) -> None:
        self.lost = f"{device.backend}'s {label(device)} failed for good: {error}"
        self._health.not_serving()
        _log.critical(
            "a device failed for good: the server is no longer usable",
            extra={"device": label(device), "error": str(error)},
        )
        self._lost.set()

    async def __aenter__(self) -> Any:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()


_FLUSH_S = 0.5

_UNWIND_S = 30.0
"""Seconds for the handlers of ended calls to return. The longest of them wait for the
row blocks that their device computes, which cannot be interrupted."""

_HAND_OVER_S = 5.0
"""Seconds for handed-over jobs to finish the row blocks begun and send a checkpoint."""
