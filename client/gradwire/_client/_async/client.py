"""The client for programs with an event loop: `AsyncClient`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Sequence,
)
from functools import partial
from typing import Any, TypeVar

import grpc

from gradwire._api.errors import ClientStateError, GradwireError
from gradwire._api.options import (
    DtypeLike,
    Metadata,
    OnProgress,
    Options,
    ResultDtypes,
    at_most,
    parse_options,
    parse_timeout,
)
from gradwire._api.types import (
    Array,
    Backward,
    Gradients,
    Receipt,
    ServerInfo,
    server_info_of,
)
from gradwire._api.verify import VerifyLike
from gradwire._client._async.stream import AsyncGradientStream
from gradwire._client.job_factory import BaseClient
from gradwire._core.exchange import JobExchange
from gradwire._resilience.array_job import ArrayJob
from gradwire._resilience.load_balancer import (
    ASK_S,
    Lease,
    LoadBalancer,
    ServerState,
    none_left,
    require_jobs,
)
from gradwire._resilience.retry import Attempts, RetriesLike
from gradwire._resilience.row_reader import RowReader
from gradwire._transport.address import addresses_of, host_and_port
from gradwire._transport.bearer_token import TokenLike
from gradwire._transport.grpc import fork_support
from gradwire._transport.grpc.async_call import AsyncCall, AsyncConnection
from gradwire._transport.grpc.grpc_errors import call_error, connect_error
from gradwire._transport.shm.policy import EmptyArray, may_be_smaller
from gradwire._transport.shm.segments import Allocation
from gradwire._transport.shm.shm_job import ShmJob
from gradwire._transport.tls import Tls
from gradwire_protocol.matrices import RESULTS, Matrix
from gradwire_protocol.v1.gradient_service_pb2 import (
    GetServerInfoRequest,
    GetServerInfoResponse,
)

_Result = TypeVar("_Result")


class AsyncClient(BaseClient):
    """A server's gradients, for programs with an event loop.

    Making one does no I/O; entering it as a context manager shakes hands as
    `connect` does. Without that, the first call makes the connection. It
    belongs to the event loop of its first use. Coroutines may share it.

    Args:
        address: ``HOST:PORT`` or ``unix:PATH``, or several; see `connect`.
        connect_timeout_s: Seconds that the server has to answer on entering.
        timeout_s: Seconds for every call that names none itself; None: as
            long as it takes.
        metadata: Sent with every call.
        transport: As for `connect`; "auto" is "tcp" where the client is not
            entered.
        tls: Whether and how the server proves who it is; see `connect`.
        token: Sent with every call; see `connect`. What returns one is called
            on the event loop, which it must not keep.
        retries: When a call that failed is made again; see `connect`.
        verify: How results are checked here; see `connect`.

    Raises:
        InputError: The address or the transport is none, or a file of `tls`
            or the token cannot be used.

    Example:
        >>> async with gradwire.AsyncClient("gpu-node:50051") as client:
        ...     y, dx, dw = await client.gradients(x, w, dy)
    """

    def __init__(
        self,
        address: str | Sequence[str],
        *,
        connect_timeout_s: float | None = 10.0,
        timeout_s: float | None = None,
        metadata: Metadata = (),
        transport: str = "auto",
        tls: Tls | bool | None = None,
        token: TokenLike | None = None,
        retries: RetriesLike = True,
        verify: VerifyLike = None,
    ) -> None:
        super().__init__(
            address,
            timeout_s=timeout_s,
            metadata=metadata,
            transport=transport,
            tls=tls,
            token=token,
            retries=retries,
            verify=verify,
        )
        self._closing = asyncio.Event()
        self._connect_timeout_s = parse_timeout(connect_timeout_s, "connect_timeout_s")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connected: AsyncConnection | None = None
        self._servers: LoadBalancer[AsyncClient] | None = None
        if self._endpoints is not None:
            tls_of = self._endpoints.tls_of

            def member(address: str, name: str | None) -> AsyncClient:
                return AsyncClient(
                    address,
                    metadata=metadata,
                    transport="tcp",
                    tls=tls_of(name),
                    token=token,
                    retries=retries,
                )

            known, names = self._addresses.known, self._addresses.names
            self._servers = LoadBalancer(member, known, names)

    async def __aenter__(self) -> AsyncClient:
        """Shake hands with the server.

        Raises:
            ConnectError: As for `connect`.
        """
        try:
            if self._servers is not None:
                await self._handshakes(self._servers, self._connect_timeout_s)
            else:
                await self._probe(self._connect_timeout_s)
            if self._sharing.demanded:
                await self._allocate([1])
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls that still run are cancelled."""
        self._closed = True
        self._closing.set()
        connected, self._connected = self._connected, None
        for member in self._servers.all_clients() if self._servers else ():
            await member.close()
        self._sharing.pool.close()
        self._memory.close()
        if connected is not None:
            await connected.channel.close()

    async def server_info(
        self, *, timeout_s: float | None = None, address: str | None = None
    ) -> ServerInfo:
        """What the server is, offers and allows; see `Client.server_info`.

        Raises:
            InputError: There is none of that address.
            CallError: It did not say.

        Example:
            >>> (await client.server_info()).limits.max_jobs
            64
        """
        seconds = parse_timeout(timeout_s, "timeout_s") or self._timeout_s
        if address is not None:
            client = await self._client_for(address)
            if client is not self:
                return await client.server_info(timeout_s=seconds)
        attempts = Attempts(self._retries, seconds)

        async def attempt() -> ServerInfo:
            with await self._lease(attempts) as lease:
                try:
                    answer = await lease.client._info(attempts.left_s)
                except grpc.RpcError as error:
                    raise call_error(error, lease.client._endpoint) from None
                return server_info_of(answer)

        return await self._retried(attempts, attempt)

    async def empty(
        self, shape: int | Sequence[int], dtype: DtypeLike = "float32"
    ) -> Array:
        """An array whose elements need not travel; see `Client.empty`.

        Returns:
            An array, not initialised.

        Raises:
            InputError: The shape or the dtype is none.
            GradwireError: ``transport="shm"``, and the server has no more
                memory.

        Example:
            >>> x = await client.empty((4096, 1024))
        """
        self._require_open()
        wanted = EmptyArray(shape, dtype)
        return wanted.made(
            await self._allocate(wanted.sizes) if self._sharing.on else None
        )

    async def gradients(
        self,
        x: Any,
        w: Any,
        dy: Any,
        *,
        results: str | Iterable[str] = ("y", "dx", "dw"),
        out: Any = None,
        result_dtype: ResultDtypes = None,
        wire_dtype: DtypeLike = None,
        dw_accumulator: DtypeLike = None,
        allow_tf32: bool = False,
        checksum: bool = False,
        verify: VerifyLike = None,
        timeout_s: float | None = None,
        on_progress: OnProgress | None = None,
        request_id: str | None = None,
        metadata: Metadata = (),
        checkpoint_rows: int | None = None,
    ) -> Gradients:
        """Y = X W, dX = dY Wᵀ and dW = Xᵀ dY; see `Client.gradients`.

        Returns:
            The tuple (y, dx, dw); None for results that are not wanted.

        Raises:
            InputError: An argument is refused; nothing was sent.
            GradwireError: The job failed; see the tree.

        Example:
            >>> y, dx, dw = await client.gradients(x, w, dy)
        """
        options = parse_options(
            results=results,
            result_dtype=result_dtype,
            wire_dtype=wire_dtype,
            dw_accumulator=dw_accumulator,
            allow_tf32=allow_tf32,
            checksum=checksum,
            verify=verify,
            timeout_s=timeout_s,
            on_progress=on_progress,
            request_id=request_id,
            metadata=metadata,
            checkpoint_rows=checkpoint_rows,
        )
        given = {Matrix.X: x, Matrix.W: w, Matrix.DY: dy}
        job = self._array_job(given, out, RESULTS, options)
        receipt = await self._run(job)
        y, dx, dw = job.results(*RESULTS)
        return Gradients(y, dx, dw, receipt)

    async def forward(
        self,
        x: Any,
        w: Any,
        *,
        out: Any = None,
        result_dtype: ResultDtypes = None,
        wire_dtype: DtypeLike = None,
        allow_tf32: bool = False,
        checksum: bool = False,
        verify: VerifyLike = None,
        timeout_s: float | None = None,
        on_progress: OnProgress | None = None,
        request_id: str | None = None,
        metadata: Metadata = (),
    ) -> Any:
        """Y = X W alone; see `Client.forward`.

        Returns:
            Y, shape (..., k); or `out`, where that was given.

        Raises:
            InputError: An argument is refused; nothing was sent.
            GradwireError: The job failed; see the tree.

        Example:
            >>> y = await client.forward(x, w)
        """
        options = parse_options(
            results="y",
            result_dtype=result_dtype,
            wire_dtype=wire_dtype,
            allow_tf32=allow_tf32,
            checksum=checksum,
            verify=verify,
            timeout_s=timeout_s,
            on_progress=on_progress,
            request_id=request_id,
            metadata=metadata,
        )
        given = {Matrix.X: x, Matrix.W: w}
        job = self._array_job(given, out, (Matrix.Y,), options)
        await self._run(job)
        return job.results(Matrix.Y)[0]

    async def backward(
        self,
        x: Any,
        w: Any,
        dy: Any,
        *,
        out: Any = None,
        result_dtype: ResultDtypes = None,
        wire_dtype: DtypeLike = None,
        dw_accumulator: DtypeLike = None,
        allow_tf32: bool = False,
        checksum: bool = False,
        verify: VerifyLike = None,
        timeout_s: float | None = None,
        on_progress: OnProgress | None = None,
        request_id: str | None = None,
        metadata: Metadata = (),
        checkpoint_rows: int | None = None,
    ) -> Backward:
        """The two gradients, dX = dY Wᵀ and dW = Xᵀ dY; see `Client.backward`.

        Returns:
            The tuple (dx, dw) of shapes (..., n) and (n, k).

        Raises:
            InputError: An argument is refused; nothing was sent.
            GradwireError: The job failed; see the tree.

        Example:
            >>> dx, dw = await client.backward(x, w, dy)
        """
        options = parse_options(
            results=("dx", "dw"),
            result_dtype=result_dtype,
            wire_dtype=wire_dtype,
            dw_accumulator=dw_accumulator,
            allow_tf32=allow_tf32,
            checksum=checksum,
            verify=verify,
            timeout_s=timeout_s,
            on_progress=on_progress,
            request_id=request_id,
            metadata=metadata,
            checkpoint_rows=checkpoint_rows,
        )
        given = {Matrix.X: x, Matrix.W: w, Matrix.DY: dy}
        job = self._array_job(given, out, (Matrix.DX, Matrix.DW), options)
        receipt = await self._run(job)
        dx, dw = job.results(Matrix.DX, Matrix.DW)
        return Backward(dx, dw, receipt)

    def stream(
        self,
        rows: Iterable[Any] | AsyncIterable[Any],
        w: Any = None,
        *,
        m: int | None = None,
        results: str | Iterable[str] = ("y", "dx", "dw"),
        result_dtype: ResultDtypes = None,
        wire_dtype: DtypeLike = None,
        dw_accumulator: DtypeLike = None,
        allow_tf32: bool = False,
        checksum: bool = False,
        verify: VerifyLike = None,
        timeout_s: float | None = None,
        on_progress: OnProgress | None = None,
        request_id: str | None = None,
        metadata: Metadata = (),
        checkpoint_rows: int | None = None,
    ) -> AsyncGradientStream:
        """The gradients of rows that need not be there all at once.

        As `Client.stream`, but that `rows` may be an asynchronous iterable
        too, and that every item is asked for on the event loop: one that
        takes its time should be asynchronous.

        Returns:
            An asynchronous iterator of `RowBlock`, which has `dw` and
            `receipt` once it is exhausted.

        Raises:
            InputError: An argument is refused. One that only the iterable's
                items show to be wrong is refused while iterating.

        Example:
            >>> async with client.stream(pairs(), w) as stream:
            ...     async for block in stream:
            ...         save(block.first_row, block.y, block.dx)
            >>> stream.dw
        """
        options = parse_options(
            results=results,
            result_dtype=result_dtype,
            wire_dtype=wire_dtype,
            dw_accumulator=dw_accumulator,
            allow_tf32=allow_tf32,
            checksum=checksum,
            verify=verify,
            timeout_s=timeout_s,
            on_progress=on_progress,
            request_id=request_id,
            metadata=metadata,
            checkpoint_rows=checkpoint_rows,
        )
        self._require_open()
        reader = RowReader(w, m, self._with_defaults(options))
        return AsyncGradientStream(self, rows, reader)

    async def _run(self, job: ArrayJob) -> Receipt:
        attempts = self._attempts(job.plan.options)
        attempt = partial(self._attempt, job, attempts)
        receipt = await self._retried(attempts, attempt)
        return self._remember_receipt(job.delivered(attempts.annotate(receipt)))

    async def _attempt(self, job: ArrayJob, attempts: Attempts) -> Receipt:
        """Compute a job, once, on the server that is best for it."""
        with await self._lease(attempts) as lease:
            receipt, at = await lease.client._execute(job, attempts), lease.client
            if job.to_verify:
                return await asyncio.to_thread(job.verified, receipt, at.address)
            return job.verified(receipt, at.address)

    async def _lease(self, attempts: Attempts) -> Lease[AsyncClient]:
        """A server for an attempt.

        Raises:
            ConnectError: There are several, and none can be had.
        """
        servers = self._servers
        if servers is None:
            return Lease(self)
        self._require_open()
        await self._resolve(servers)
        causes = servers.unresolved()
        while (member := servers.choose(attempts.avoid, causes)) is not None:
            lease = Lease(member.client, servers, member, attempts)
            if not member.needs_probe:
                return lease
            try:
                seconds = at_most(ASK_S, attempts.left_s)
                require_jobs(await member.client._probe(seconds), member.address)
            except GradwireError as error:
                causes[member.address] = error
                lease.ended(error)
            except BaseException as error:
                lease.ended(error)
                raise
            else:
                servers.mark_healthy(member)
                self._learn_of(servers.all_clients())
                return lease
        raise none_left(causes)

    async def _resolve(self, servers: LoadBalancer[AsyncClient]) -> None:
        """Look up the names whose addresses may have changed."""
        loop = asyncio.get_running_loop()
        for name in servers.names_due():
            host, port = host_and_port(name)
            try:
                found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            except OSError as error:
                servers.not_resolved(name, error)
                continue
            for gone in servers.resolved(name, addresses_of(port, found)):
                await gone.close()

    async def _probe(self, timeout_s: float | None) -> ServerInfo:
        """What the server says that it is, if it is one to go on with.

        Raises:
            ConnectError: It does not answer, or it is not.
        """
        try:
            answer = await self._info(timeout_s)
        except grpc.RpcError as error:
            raise connect_error(error, self._endpoint, timeout_s or 0) from None
        return self._require_contract(server_info_of(answer))

    async def _handshakes(
        self, servers: LoadBalancer[AsyncClient], timeout_s: float | None
    ) -> None:
        """Ask all servers, side by side."""
        await self._resolve(servers)
        causes, mark_healthy = servers.unresolved(), False

        async def ask(member: ServerState[AsyncClient]) -> bool:
            try:
                require_jobs(await member.client._probe(timeout_s), member.address)
            except GradwireError as error:
                causes[member.address] = error
                servers.record_failure(member, error)
                return False
            servers.mark_healthy(member)
            return True

        for member in servers.members:
            member.needs_probe = True
        waiting = {asyncio.create_task(ask(member)) for member in servers.members}
        try:
            while waiting:
                done, waiting = await asyncio.wait(
                    waiting,
                    timeout=ASK_S if mark_healthy else None,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if not done:
                    break
                for task in done:
                    mark_healthy |= task.result()
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        if not mark_healthy:
            raise none_left(causes)
        self._learn_of(servers.all_clients())

    async def _client_for(self, address: str) -> AsyncClient:
        """The client of one server."""
        if self._servers is None:
            return self._lookup(address, {self._address: self})
        await self._resolve(self._servers)
        members = self._servers.members
        return self._lookup(address, {each.address: each.client for each in members})

    async def _retried(
        self, attempts: Attempts, attempt: Callable[[], Awaitable[_Result]]
    ) -> _Result:
        """What the first attempt gives that does not fail, or is the last."""
        while True:
            try:
                result = await attempt()
            except GradwireError as error:
                delay_s = attempts.after(error)
                if delay_s is None:
                    raise
            else:
                attempts.succeeded()
                return result
            await self._sleep(delay_s)

    async def _sleep(self, seconds: float) -> None:
        """Wait, unless the client is closed meanwhile."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._closing.wait()

    async def _execute(self, job: ArrayJob, attempts: Attempts) -> Receipt:
        """Compute a job, once."""
        options = job.plan.options
        if self._shares(job):
            receipt = await self._run_shared(job, attempts)
            if receipt is not None:
                return receipt
        if job.unary:
            return await self._compute(job, attempts.options(options))
        while True:
            exchange = job.exchange()
            try:
                return await self._stream(job, exchange, attempts.options(options))
            except GradwireError as error:
                if not job.cut_off(exchange, error, attempts):
                    raise

    async def _stream(
        self, job: ArrayJob, exchange: JobExchange, options: Options
    ) -> Receipt:
        async with AsyncCall(
            self._connection(),
            exchange,
            lambda: _messages(job.messages(exchange)),
            options,
        ) as call:
            async for message in call:
                exchange.receive(message)
            return exchange.finish()

    async def _run_shared(
        self, job: ArrayJob, attempts: Attempts, *, again: bool = True
    ) -> Receipt | None:
        """Compute a job in shared memory; None where there is none for it."""
        shared = self._sharing.place(job)
        rooms = await self._allocate(shared.sizes)
        if rooms is None:
            return None
        shared.place(rooms)
        await _beside(shared, shared.copy_in)
        exchange = shared.exchange()
        options = attempts.options(job.plan.options)
        try:
            async with AsyncCall(
                self._connection(),
                exchange,
                lambda: _messages(exchange.messages()),
                options,
            ) as call:
                async for message in call:
                    exchange.receive(message)
                receipt = exchange.finish()
        except BaseException as error:
            if not shared.worth_another_try(error) or not again:
                if shared.at_risk:
                    attempts.make_final()
                raise
        else:
            await _beside(shared, shared.copy_out)
            return receipt
        return await self._run_shared(job, attempts, again=False)

    async def _allocate(self, sizes: Sequence[int]) -> list[Allocation] | None:
        """Room in shared memory; None where there is none.

        Raises:
            GradwireError: There is none, and it is demanded.
        """
        if not sizes:
            return []
        connection = self._connection()
        pool = self._sharing.pool
        rooms = pool.allocate(sizes)
        if rooms is not None:
            return rooms
        refusal: GradwireError | None = None
        for size_bytes in pool.bytes_to_open(sizes):
            try:
                region = await connection.open_region(size_bytes, self._metadata)
            except GradwireError as error:
                refusal = error
                if not may_be_smaller(error):
                    break
            else:
                return pool.add(region, sizes)
        if refusal is not None:
            self._sharing.on_refusal(refusal)
        return None

    async def _compute(self, job: ArrayJob, options: Options) -> Receipt:
        exchange = job.unary_exchange()
        try:
            connection, request = self._connection(), exchange.request(job.operands)
            with fork_support.aio_calling():
                response = await connection.compute(
                    request, timeout=options.timeout_s, metadata=options.metadata
                )
        except grpc.RpcError as error:
            raise call_error(error, self._endpoint, options.job_id) from None
        return exchange.receive(response)

    async def _info(self, timeout_s: float | None) -> GetServerInfoResponse:
        connection = self._connection()
        with fork_support.aio_calling():
            return await connection.info(
                GetServerInfoRequest(), timeout=timeout_s, metadata=self._metadata
            )

    def _connection(self) -> AsyncConnection:
        self._require_open()
        self._require_calls()
        if fork_support.aio_lost is not None:
            raise ClientStateError(fork_support.aio_lost)
        loop = asyncio.get_running_loop()
        if os.getpid() != self._pid:
            raise ClientStateError(
                "this AsyncClient was made before the process forked: make another"
                " in the child"
            )
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise ClientStateError(
                "this AsyncClient belongs to another event loop, that of its first"
                " use: make one for each loop"
            )
        if self._connected is None:
            self._connected = AsyncConnection(self._endpoint)
        return self._connected


async def _beside(shared: ShmJob, copy: Callable[[], None]) -> None:
    """Copy where the event loop's others do not notice, if it takes a while."""
    if shared.copies:
        await asyncio.to_thread(copy)
    else:
        copy()


async def _messages(messages: Iterator[bytes]) -> AsyncGenerator[bytes]:
    for message in messages:
        yield message
