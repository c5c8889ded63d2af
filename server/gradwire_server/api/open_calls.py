"""The open calls, so that a server stops only after their handlers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc


class OpenCalls(grpc.aio.ServerInterceptor):
    """Knows the tasks of all calls, for which `grpc.aio.Server.stop` does not wait.

    A handler may outlast its call: it waits for its row blocks on the device, and for
    the kernel to free shared memory. If the event loop ends meanwhile, it cancels
    gRPC's own tasks, and gRPC logs a traceback for each.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Add the call, which gRPC serves in the calling task; return its handler."""
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a call runs in a task")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await continuation(handler_call_details)

    async def wait_ended(self, timeout_s: float) -> None:
        """Wait until the handlers of all calls have ended, but at most `timeout_s`."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
