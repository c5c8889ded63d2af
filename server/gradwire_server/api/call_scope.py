"""One call's reserved memory, error status and log line."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import TypeAlias

import grpc

from gradwire_protocol.error_details import encode
from gradwire_protocol.error_reasons import Reason
from gradwire_server.admission import tenancy
from gradwire_server.api.call_state import CallState
from gradwire_server.api.job_service import JobService
from gradwire_server.errors import JobError
from gradwire_server.observability.calls import CallObserver

_log = logging.getLogger("gradwire_server")

Context: TypeAlias = grpc.aio.ServicerContext[bytes, bytes]


async def call_scope(
    service: JobService,
    method: str,
    context: Context,
    serve: Callable[[CallState], Awaitable[bytes | None]],
    *,
    while_draining: bool = False,
) -> bytes | None:
    """Serve a call; turn any exception into a status and a log line.

    An unexpected error reaches the client as an id only; the log has the id and the
    traceback.

    Args:
        service: The job service.
        method: The method's name.
        context: The call.
        serve: Serves it.
        while_draining: Whether it is served while the server drains.

    Returns:
        The response for gRPC to send, if the method has one. The call holds its memory
        until the response is sent.
    """
    answer: bytes | None = None
    call = CallState(
        method=method,
        transport="unix" if context.peer().startswith("unix") else "tcp",
        tenant=tenancy.current.get(),
        metadata=context.invocation_metadata,
    )
    observer = service.call_observer
    observer.began(call)
    try:
        with ExitStack() as held:
            held.enter_context(
                service.admission.call(
                    tenant=call.tenant, while_draining=while_draining
                )
            )
            try:
                answer, failure = await _outcome(observer, call, context, serve)
            finally:
                service.job_ended(call)
            if failure is not None:
                await _fail(observer, call, context, failure)
            if answer is not None:
                _hold_until_read(call, held.pop_all(), service.settings.idle_timeout)
    except JobError as refused:
        await _fail(observer, call, context, refused)
    return answer


def _hold_until_read(call: CallState, held: ExitStack, idle_s: float) -> None:
    """Close `held` when gRPC has sent the handler's response.

    A client that does not read for `idle_s` no longer counts. gRPC cannot drop the
    response and keeps it in memory.
    """
    task = asyncio.current_task()
    if task is None:
        raise RuntimeError("a call runs in a task")

    def give_up() -> None:
        _log.warning("the answer was not read", extra=_names(call))
        task.cancel()

    def sent(_: object) -> None:
        too_late.cancel()
        held.close()

    too_late = asyncio.get_running_loop().call_later(idle_s, give_up)
    task.add_done_callback(sent)


async def _outcome(
    observer: CallObserver,
    call: CallState,
    context: Context,
    serve: Callable[[CallState], Awaitable[bytes | None]],
) -> tuple[bytes | None, JobError | None]:
    """Serve a call; report its success or cancellation.

    An error is returned rather than raised, and without its traceback: a status is sent
    only after the client has read the earlier messages, and a traceback's frames would
    hold the job's memory until then.

    Returns:
        The response and the error, at most one of them.
    """
    try:
        answer = await serve(call)
    except asyncio.CancelledError:
        late = _is_late(context)
        observer.ended(call, Reason.DEADLINE_PASSED if late else Reason.JOB_CANCELLED)
        raise
    except JobError as error:
        return None, error.bare()
    except MemoryError:
        return None, JobError(
            Reason.DEVICE_OUT_OF_MEMORY,
            "there is no memory for this call, though the server's limit allows it",
        )
    except Exception:  # noqa: BLE001 - logged; the client gets the id
        error_id = f"error-{secrets.token_hex(6)}"
        _log.exception(
            "unforeseen error",
            extra={"error_id": error_id, **_names(call)},
        )
        return None, JobError(
            Reason.UNFORESEEN,
            f"the server failed; its log has the cause as {error_id}",
            metadata={"error_id": error_id},
        )
    call.complete = True
    observer.ended(call, None)
    return answer, None


def _names(call: CallState) -> dict[str, str]:
    """Return the fields of a log line that name a call."""
    return {"job_id": call.job_id, **(call.trace_ids or {})}


def _is_late(context: Context) -> bool:
    """Return whether a cancelled call has reached its deadline.

    The client's clock may be ahead: its cancellation then arrives slightly before the
    deadline here.
    """
    remaining = context.time_remaining()
    return remaining is not None and remaining < _DEADLINE_SLACK_S


_DEADLINE_SLACK_S = 0.05


async def _fail(
    observer: CallObserver, call: CallState, context: Context, error: JobError
) -> None:
    observer.ended(call, error.reason, error)
    status = error.reason.status
    trailer = encode(status, error.message, error.details(call.job_id))
    if call.opening is not None and not call.opening.done():
        await asyncio.wait({call.opening})
    try:
        await context.abort(status, error.message, trailer)
    except grpc.aio.InternalError:
        # The client left before reading the status; gRPC would log this error.
        raise asyncio.CancelledError from None
