"""The methods of `gradwire.v1.SessionService`: decode, call, encode.

As in `gradient_servicer`, methods receive and return bytes, and are registered with
streamed requests.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    nullcontext,
)
from functools import partial
from typing import Any, TypeAlias, TypeVar

import grpc
from google.protobuf.message import Message

from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.limits import MAX_MESSAGE_BYTES, SESSION_SERVICE
from gradwire_protocol.v1 import job_pb2
from gradwire_protocol.v1 import session_service_pb2 as pb2
from gradwire_server.api.call_scope import call_scope
from gradwire_server.api.call_state import CallState
from gradwire_server.api.call_stream import CallStream
from gradwire_server.api.client_timeouts import ClientTimeouts
from gradwire_server.api.job_service import JobService
from gradwire_server.backends.base import DeviceLostError
from gradwire_server.backends.device_info import device_message
from gradwire_server.errors import JobError
from gradwire_server.jobs.header.parse import check_features
from gradwire_server.scheduling.device_worker import TenantHandle
from gradwire_server.sessions import steps
from gradwire_server.sessions.saved_states import SavedStates
from gradwire_server.sessions.session import Session
from gradwire_server.sessions.state_files import check_name
from gradwire_server.sessions.tensor_headers import contents_of
from gradwire_server.sessions.tensors import KeptTensor
from gradwire_server.sessions.transfer import Do, IncomingTensor, outgoing
from gradwire_server.sessions.windows import WINDOW_BYTES

Context: TypeAlias = grpc.aio.ServicerContext[bytes, bytes]
Request = TypeVar("Request", bound=Message)
Handle: TypeAlias = Callable[[CallState, Request], Awaitable[Message]]


class SessionServicer:
    """Handlers of the methods for sessions.

    Args:
        service: The job service.
    """

    def __init__(self, service: JobService) -> None:
        self._service = service
        self._sessions = service.sessions
        self._timeouts = ClientTimeouts(service.settings.idle_timeout)

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
                "PutTensor": grpc.stream_unary_rpc_method_handler(self.put_tensor),
                "GetTensor": grpc.stream_stream_rpc_method_handler(self.get_tensor),
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
                stream = CallStream(self._timeouts, call, context)
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

    async def put_tensor(
        self, _: AsyncIterator[bytes], context: Context
    ) -> bytes | None:
        """Serve PutTensor: a tensor's header, then its elements."""

        async def serve(call: CallState) -> bytes:
            stream = CallStream(self._timeouts, call, context)
            first = await stream.read_first(pb2.PutTensorRequest, "a header first")
            if first.WhichOneof("message") != "header":
                raise _unexpected(first, "a header first")
            header = first.header
            used = self._sessions.used(header.session, call.tenant, "header.session")
            with self._memory(call), used as session:
                async with session.puts.one(header) as made:
                    session.require_open()
                    if made:
                        async for _ in _chunks(stream, call):
                            pass  # gRPC's clients may miss an answer before the end
                    else:
                        left_s = context.time_remaining()
                        await self._put(call, stream, session, header, left_s)
                return pb2.PutTensorResponse(
                    used_bytes=session.used_bytes
                ).SerializeToString()

        return await call_scope(self._service, "PutTensor", context, serve)

    async def _put(
        self,
        call: CallState,
        stream: CallStream,
        session: Session,
        header: pb2.TensorHeader,
        left_s: float | None,
    ) -> None:
        """Receive a tensor's elements, or find those of an equal one, and keep it."""
        worker = self._worker(call, session)
        chunks, first = _chunks(stream, call), None
        shared: AbstractAsyncContextManager[KeptTensor | None] = nullcontext()
        contents = contents_of(session, header)
        if contents is not None:
            first = await anext(chunks, None)
            if first is None:  # the client asks whether it has to send the elements
                wait_s = math.inf if left_s is None else left_s / 2
                shared = session.shared.asked(contents, session, wait_s)
            else:
                shared = session.shared.putting(contents, session)
        async with (
            shared as source,
            self._on_device(call, session),
            IncomingTensor(session, header, worker, source) as tensor,
        ):
            session.require_open()
            if first is not None:
                await tensor.take(first)
            async for chunk in chunks:
                await tensor.take(chunk)
            if not tensor.is_complete and (contents is None or first is not None):
                await stream.await_cancellation()
            await tensor.finish()
            # The elements of a state may be on their way to a client.
            turns = session.turns
            async with turns.alone() if header.state else turns.shared():
                session.require_open()
                tensor.keep()

    async def get_tensor(self, _: AsyncIterator[bytes], context: Context) -> None:
        """Serve GetTensor: the elements of a tensor."""

        async def serve(call: CallState) -> None:
            stream = CallStream(self._timeouts, call, context)
            request = await stream.read_request(pb2.GetTensorRequest)
            memory = self._memory(call, while_draining=True)
            with memory, self._used(call, request.session) as session:
                tensor = session.tensor(request.tensor, "tensor")
                # Jobs add to a gradient.
                turns = session.turns
                turn = turns.alone() if tensor.gradient else turns.shared()
                async with turn:
                    session.require_open()
                    tensor = session.tensor(request.tensor, "tensor")
                    with session.using(tensor):
                        async with self._on_device(call, session) as do:
                            messages = outgoing(
                                tensor, request, session.memory.on_device, do
                            )
                            async for response in messages:
                                await stream.write(response.SerializeToString())
                                call.progress.bytes_sent += len(response.chunk.data)

        await call_scope(
            self._service, "GetTensor", context, serve, while_draining=True
        )

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
        with self._used(call, request.session) as session:
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

    def _used(self, call: CallState, token: str) -> AbstractContextManager[Session]:
        return self._sessions.used(token, call.tenant)

    def _memory(
        self, call: CallState, *, while_draining: bool = False
    ) -> AbstractContextManager[None]:
        """Reserve host memory for a tensor's messages, and for copies to a device."""
        size_bytes = MAX_MESSAGE_BYTES
        if not self._service.backend.devices[0].in_host_memory:
            size_bytes += WINDOW_BYTES
        return self._service.admission.call(
            size_bytes, call.tenant, while_draining=while_draining
        )

    def _worker(self, call: CallState, session: Session) -> TenantHandle:
        return self._service.workers[session.device].of(call.tenant)

    @asynccontextmanager
    async def _on_device(self, call: CallState, session: Session) -> AsyncIterator[Do]:
        """Provide what does work on a session's device for a call.

        After this context none of it is in progress.

        Raises:
            JobError: The device is lost.
        """
        worker = self._worker(call, session)
        try:
            yield partial(worker.submit, call)
        except DeviceLostError as error:
            raise await self._service.device_lost(session.device, error) from None
        finally:
            await worker.discard(call)

    def _device(self, session: Session) -> job_pb2.Device:
        service = self._service
        return device_message(
            service.backend.devices[session.device],
            service.settings.device_memory_limit,
        )


async def _chunks(
    stream: CallStream, call: CallState
) -> AsyncIterator[pb2.TensorChunk]:
    """Yield a tensor's chunks, up to the half-close."""
    async for request in stream.requests(
        pb2.PutTensorRequest, "the next chunk, or the half-close"
    ):
        if request.WhichOneof("message") != "chunk":
            raise _unexpected(request, "a chunk")
        yield request.chunk
        call.progress.bytes_received += len(request.chunk.data)
        if request.chunk.data:  # chunks without elements are no progress
            stream.progressed()


def _no_states(field: str | None) -> JobError:
    given = "" if field is None else f"{field} is given, but "
    return JobError(
        Reason.FEATURE_UNKNOWN,
        f"{given}this server saves no sessions: its operator has set no state_dir",
        field=field,
    )


def _unexpected(request: pb2.PutTensorRequest, expected: str) -> JobError:
    came = request.WhichOneof("message") or "nothing known"
    return JobError(
        Reason.MESSAGE_UNEXPECTED, f"a message with {came} came: expected {expected}"
    )
