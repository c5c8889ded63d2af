"""The methods of `gradwire.v1.SessionService`: decode, call, encode.

As in `gradient_servicer`, methods receive and return bytes, and are registered with
streamed requests.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeAlias, TypeVar

import grpc
from google.protobuf.message import Message

from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.limits import SESSION_SERVICE
from gradwire_protocol.v1 import job_pb2
from gradwire_protocol.v1 import session_service_pb2 as pb2
from gradwire_server.api.call_scope import call_scope
from gradwire_server.api.call_state import CallState
from gradwire_server.api.call_stream import CallStream
from gradwire_server.api.job_service import JobService
from gradwire_server.api.session_calls import SessionCalls
from gradwire_server.api.tensor_servicer import TensorServicer
from gradwire_server.backends.device_info import device_message
from gradwire_server.errors import JobError
from gradwire_server.jobs.header.parse import check_features
from gradwire_server.sessions import steps
from gradwire_server.sessions.saved_states import SavedStates
from gradwire_server.sessions.session import Session
from gradwire_server.sessions.state_files import check_name

Context: TypeAlias = grpc.aio.ServicerContext[bytes, bytes]
Request = TypeVar("Request", bound=Message)
Handle: TypeAlias = Callable[[CallState, Request], Awaitable[Message]]


class SessionServicer(SessionCalls):
    """Handlers of the methods for sessions.

    Args:
        service: The job service.
    """

    def __init__(self, service: JobService) -> None:
        super().__init__(service)
        self._tensors = TensorServicer(service)

    def handler(self) -> grpc.GenericRpcHandler:
        """Return the handler to register with a gRPC server."""
        methods: tuple[tuple[str, Any, Any], ...] = (
            ("OpenSession", pb2.OpenSessionRequest, self._open),
            ("RenewSession", pb2.RenewSessionRequest, self._renew),
            ("CloseSession", pb2.CloseSessionRequest, self._close),
            ("ListSessions", pb2.ListSessionsRequest, self._list),
            ("DescribeSession", pb2.DescribeSessionRequest, self._describe),
            ("DropTensors", pb2.DropTensorsRequest, self._drop),
            ("Step", pb2.StepRequest, self._step),
            ("SaveSession", pb2.SaveSessionRequest, self._save),
            ("ListSavedStates", pb2.ListSavedStatesRequest, self._list_saved),
            ("DeleteSavedState", pb2.DeleteSavedStateRequest, self._delete_saved),
        )
        return grpc.method_handlers_generic_handler(
            SESSION_SERVICE,
            {
                **{
                    name: grpc.stream_stream_rpc_method_handler(method)
                    for name, method in (
                        ("PutTensor", self._tensors.put_tensor),
                        ("GetTensor", self._tensors.get_tensor),
                    )
                },
                **{
                    name: grpc.stream_unary_rpc_method_handler(
                        self._unary(name, kind, handle)
                    )
                    for name, kind, handle in methods
                },
            },
        )

    def _unary(
        self, name: str, kind: type[Request], handle: Handle[Request]
    ) -> Callable[[AsyncIterator[bytes], Context], Awaitable[bytes | None]]:
        """Return the handler of a method with one message each way."""

        async def method(_: AsyncIterator[bytes], context: Context) -> bytes | None:
            async def serve(call: CallState) -> bytes:
                async with aclosing(CallStream(self._idle_s, call, context)) as stream:
                    request = await stream.read_request(kind)
                return (await handle(call, request)).SerializeToString()

            return await call_scope(
                self._service,
                name,
                context,
                serve,
                while_draining=name != "OpenSession",
            )

        return method

    async def _open(
        self, call: CallState, request: pb2.OpenSessionRequest
    ) -> pb2.OpenSessionResponse:
        # First: it names what was asked for, which is more than the feature it needs.
        states = self._states_for(request)
        check_features(
            request.required_features, self._service.features, "required_features"
        )
        async with self._sessions.opening(request, call.tenant) as existing:
            session = existing or await self._opened(call, request, states)
        call.session = session.id
        return pb2.OpenSessionResponse(
            session=session.token,
            server_instance=self._service.instance,
            device=self._device(session),
            lease_seconds=session.lease_s,
            id=session.id,
            step=session.step,
        )

    async def _opened(
        self,
        call: CallState,
        request: pb2.OpenSessionRequest,
        states: SavedStates | None,
    ) -> Session:
        """Return a new session, with the tensors of a saved state if it needs one."""
        saved = None
        if states is not None and request.restore:
            saved = await states.open(call.tenant, request.restore, request.keep_bytes)
        try:
            session = await self._sessions.open(request, call.tenant)
            session.save_every = request.save_every_steps
            session.save_name = request.save_name
            if states is not None and saved is not None:
                try:
                    with session.used():
                        async with self._on_device(call, session):
                            worker = self._worker(call, session)
                            await states.restore(session, saved, worker)
                except BaseException:
                    self._sessions.close(session.token, call.tenant)
                    raise
                if request.restore == request.save_name:
                    session.saved_step = saved.step
        finally:
            if saved is not None:
                saved.close()
        return session

    async def _renew(
        self, call: CallState, request: pb2.RenewSessionRequest
    ) -> pb2.RenewSessionResponse:
        with self._used(call, request.session) as session:
            return pb2.RenewSessionResponse(
                lease_seconds=session.lease_s, step=session.step
            )

    async def _close(
        self, call: CallState, request: pb2.CloseSessionRequest
    ) -> pb2.CloseSessionResponse:
        session = self._sessions.close(request.session, call.tenant, request.id)
        if session is not None:
            call.session = session.id
            await session.freed.wait()
        elif request.id and not request.session:
            self._sessions.named(request.id, call.tenant)
        return pb2.CloseSessionResponse()

    async def _list(
        self, call: CallState, request: pb2.ListSessionsRequest
    ) -> pb2.ListSessionsResponse:
        del request
        sessions = self._sessions.of(call.tenant)
        return pb2.ListSessionsResponse(sessions=[each.summary() for each in sessions])

    async def _describe(
        self, call: CallState, request: pb2.DescribeSessionRequest
    ) -> pb2.DescribeSessionResponse:
        if not request.session and request.id:
            # An operator's look at a session does not keep it open.
            session = self._sessions.named(request.id, call.tenant)
            call.session = session.id
            return self._description(session)
        with self._used(call, request.session) as session:
            return self._description(session)

    def _description(self, session: Session) -> pb2.DescribeSessionResponse:
        return pb2.DescribeSessionResponse(
            label=session.label,
            server_instance=self._service.instance,
            device=self._device(session),
            lease_seconds=session.lease_s,
            step=session.step,
            keep_bytes=session.keep_bytes,
            used_bytes=session.used_bytes,
            tensors=[
                tensor.info(session.shared.sharers(tensor))
                for _, tensor in sorted(session.tensors.items())
            ],
        )

    async def _drop(
        self, call: CallState, request: pb2.DropTensorsRequest
    ) -> pb2.DropTensorsResponse:
        with self._used(call, request.session) as session:
            async with session.turns.shared():
                for number in request.tensors:
                    session.drop(number)
                return pb2.DropTensorsResponse(used_bytes=session.used_bytes)

    async def _step(
        self, call: CallState, request: pb2.StepRequest
    ) -> pb2.StepResponse:
        with self._used(call, request.session) as session:
            async with self._on_device(call, session):
                worker = self._worker(call, session)
                return await steps.make_step(
                    self._sessions, session, request, worker, self._service.states
                )

    async def _save(
        self, call: CallState, request: pb2.SaveSessionRequest
    ) -> pb2.SaveSessionResponse:
        states = self._require_states()
        token = request.session
        if not token and request.id:
            token = self._sessions.named(request.id, call.tenant).token
        with self._used(call, token) as session:
            async with session.turns.alone():
                session.require_open()
                async with self._on_device(call, session):
                    worker = self._worker(call, session)
                    return await states.save(session, request.name, worker)

    async def _list_saved(
        self, call: CallState, request: pb2.ListSavedStatesRequest
    ) -> pb2.ListSavedStatesResponse:
        del request
        states = self._require_states()
        return pb2.ListSavedStatesResponse(states=await states.list(call.tenant))

    async def _delete_saved(
        self, call: CallState, request: pb2.DeleteSavedStateRequest
    ) -> pb2.DeleteSavedStateResponse:
        own = self._sessions.of(call.tenant)
        await self._require_states().delete(call.tenant, request.name, own)
        return pb2.DeleteSavedStateResponse()

    def _require_states(self) -> SavedStates:
        if self._service.states is None:
            raise _no_states(None)
        return self._service.states

    def _states_for(self, request: pb2.OpenSessionRequest) -> SavedStates | None:
        """Return the saved states that a session needs; None if it needs none.

        Raises:
            JobError: This server has none, or the request is invalid.
        """
        given = {
            name: getattr(request, name)
            for name in ("restore", "save_every_steps", "save_name")
            if getattr(request, name)
        }
        if not given:
            return None
        if self._service.states is None:
            raise _no_states(next(iter(given)))
        if "restore" in given:
            check_name(request.restore, "restore")
        if "save_name" in given:
            check_name(request.save_name, "save_name")
        if ("save_name" in given) != ("save_every_steps" in given):
            missing = "save_name" if "save_name" not in given else "save_every_steps"
            raise JobError(
                Reason.OPTION_INVALID,
                f"{missing} is not given: save_every_steps and save_name go together",
                field=missing,
            )
        return self._service.states

    def _device(self, session: Session) -> job_pb2.Device:
        service = self._service
        return device_message(
            service.backend.devices[session.device],
            service.settings.device_memory_limit,
        )


def _no_states(field: str | None) -> JobError:
    given = "" if field is None else f"{field} is given, but "
    return JobError(
        Reason.FEATURE_UNKNOWN,
        f"{given}this server saves no sessions: its operator has set no state_dir",
        field=field,
    )
