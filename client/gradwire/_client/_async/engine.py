"""The engine of `AsyncClient`, which makes and retries calls."""

from __future__ import annotations

import contextlib
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Collection,
    Mapping,
    Sequence,
    Set,
)
from functools import partial
from typing import Any, TypeVar

from gradwire._api.errors import (
    ClientIdleError,
    ConnectError,
    GradwireError,
    InputError,
    JobCancelledError,
    NumericsError,
)
from gradwire._api.options import (
    CallOptions,
    MetadataPairs,
    Options,
    at_most,
    within,
)
from gradwire._api.types import Array, Receipt, ServerInfo, server_info_of
from gradwire._arrays.operand import Operand
from gradwire._client.engine_base import EngineBase, look_up_address, member_options
from gradwire._client.options import ClientOptions
from gradwire._client.spread_plan import SpreadPlan
from gradwire._core.exchange import JobExchange
from gradwire._core.frame import Frame, Message
from gradwire._core.get_exchange import GetExchange
from gradwire._core.numerics import numerics_of
from gradwire._core.put_exchange import PutExchange
from gradwire._core.sender import WAIT
from gradwire._core.tensor_exchange import TensorExchange
from gradwire._resilience.array_job import ArrayJob
from gradwire._resilience.call_span import job_span
from gradwire._resilience.load_balancer import (
    ASK_S,
    Lease,
    LoadBalancer,
    ServerState,
    none_left,
    overtaken_error,
    require_jobs,
)
from gradwire._resilience.reports import REPORT_S, report_of
from gradwire._resilience.retry import Attempts
from gradwire._resilience.stream_job import StreamJob
from gradwire._transport.address import addresses_of, host_and_port, parse_addresses
from gradwire._transport.async_io import (
    AsyncAnswers,
    AsyncFlag,
    AsyncThread,
    iterate,
    look_up,
    run_beside,
)
from gradwire._transport.direct.connections import DirectConnection
from gradwire._transport.direct.transfer import DirectStream, DirectTransfer
from gradwire._transport.endpoint import Endpoints
from gradwire._transport.grpc.async_call import (
    AsyncCall,
    AsyncConnection,
    AsyncConnector,
)
from gradwire._transport.shm.policy import may_be_smaller
from gradwire._transport.shm.segments import Allocation, Pool
from gradwire._transport.shm.shm_job import ShmJob
from gradwire_protocol.limits import SEGMENTS
from gradwire_protocol.matrices import Matrix
from gradwire_protocol.v1.session_service_pb2 import GetTensorRequest, TensorHeader

R = TypeVar("R")


class AsyncEngine(EngineBase):
    """Makes the calls of a client, to one server or to several.

    The engine of several servers has an engine for each of them.

    Args:
        address: As for `connect`.
        options: As for `connect`.

    Raises:
        InputError: An argument is invalid.
    """

    client_name = "AsyncClient"

    def __init__(self, address: str | Sequence[str], options: ClientOptions) -> None:
        super().__init__(address, options)
        self._closing = AsyncFlag()
        self._connector = AsyncConnector(self._endpoint, self.after_fork)
        self._servers: LoadBalancer[AsyncEngine] | None = None
        if self._endpoints is not None:
            endpoints = self._endpoints

            def member(address: str, name: str | None) -> AsyncEngine:
                own = member_options(options, endpoints, name)
                return AsyncEngine(address, own).without_shm()

            addresses = self._addresses
            self._servers = LoadBalancer(member, addresses.known, addresses.names)

    async def handshake(self) -> ServerInfo:
        """Ask the servers about themselves.

        Of several servers, at least one has to answer. A server that does not
        answer within `ASK_S` seconds after the first is left out for now.

        Returns:
            The first answer.

        Raises:
            ConnectError: No server answered, or the server cannot be used.
        """
        waits = self.waits_for_ready()
        while True:
            try:
                return await self._handshake()
            except GradwireError as error:
                delay_s = waits(error)
                if delay_s is None:
                    raise
            await self.sleep(delay_s)

    async def _handshake(self) -> ServerInfo:
        timeout_s, servers = self.connect_timeout_s, self._servers
        if servers is None:
            info = await self._probe(timeout_s)
            if self.shm.demanded:
                await self.allocate([1])
            return info
        await self._resolve(servers)
        causes = servers.unresolved()
        with servers.held() as members:
            first = await self._ask_all(servers, members, timeout_s, causes)
        if first is None:
            raise none_left(causes)
        return first

    async def _ask_all(
        self,
        servers: LoadBalancer[AsyncEngine],
        members: Sequence[ServerState[AsyncEngine]],
        timeout_s: float | None,
        causes: dict[str, GradwireError],
    ) -> ServerInfo | None:
        """Ask servers about themselves.

        Args:
            servers: All servers.
            members: Those to ask.
            timeout_s: Seconds that they have to answer; None: no limit.
            causes: Receives the errors of those that do not answer, by address.

        Returns:
            The first answer, if there is one.
        """
        for member in members:
            member.needs_probe = True
        silent = {member.address: member for member in members}
        first: ServerInfo | None = None
        answers = AsyncAnswers({m: partial(m.engine._ask, timeout_s) for m in members})
        try:
            while answered := await answers.next(None if first is None else ASK_S):
                member, answer = answered
                del silent[member.address]
                if isinstance(answer, ServerInfo):
                    member.devices = max(1, len(answer.devices))
                    servers.mark_healthy(member)
                    first = first or answer
                elif isinstance(answer, GradwireError):
                    causes[member.address] = answer
                    servers.record_failure(member, answer)
                else:
                    raise answer
        finally:
            await answers.aclose()
        for member in silent.values():
            servers.record_failure(member, ConnectError("it does not answer"))
        if first is not None:
            self._learn_features(servers.engines())
        return first

    async def server_info(
        self, timeout_s: float | None, address: str | None = None
    ) -> ServerInfo:
        """Ask a server about itself.

        Args:
            timeout_s: Seconds that the server has to answer; None: no limit.
            address: The server's address; None: the server of the next job.

        Raises:
            InputError: There is no server at that address.
            GradwireError: The server did not answer.
        """
        if address is not None:
            engine = await self._engine_at(address)
            if engine is not self:
                return await engine.server_info(timeout_s)
        attempts = Attempts(self.retries, timeout_s)

        async def attempt() -> ServerInfo:
            with await self.lease(attempts) as lease:
                return await lease.engine._server_info(attempts.left_s)

        return await self.retry(attempts, attempt)

    async def run(self, job: ArrayJob) -> Receipt:
        """Compute a job, with retries.

        Raises:
            GradwireError: The last attempt failed.
        """
        options = job.plan.options
        span = job_span(job.plan, options.metadata, unary=job.unary)
        attempts = self.attempts(options, span)
        attempts.unusable = job.unusable
        if job.once:
            attempts.make_final()

        async def attempt() -> Receipt:
            with await self.lease(attempts) as lease:
                engine = lease.engine
                job.address = engine.address
                try:
                    return await engine._execute_checked(job, attempts)
                except NumericsError as error:
                    job.exclude(engine.address, error)
                    engine.info = None  # it was another server that has answered
                    raise
                except JobCancelledError:
                    if job.late:
                        lease.ended(overtaken_error(engine.address))
                    raise
                except GradwireError as error:
                    await engine.report(error, attempts)
                    raise

        receipt = await self.retry(attempts, attempt)
        return job.deliver(attempts.annotate(receipt))

    async def report(self, error: GradwireError, attempts: Attempts) -> None:
        """Tell this engine's server of a failure of its results, found here.

        The caller gets that error anyway: whether the report arrives makes no
        difference to it.
        """
        report = report_of(error)
        if report is None:
            return
        metadata = (*self.jobs.metadata, *report)
        within_s = at_most(REPORT_S, attempts.left_s)
        with contextlib.suppress(GradwireError):
            await self._connection().server_info(within_s, metadata)

    async def lease(self, attempts: Attempts) -> Lease[AsyncEngine]:
        """Choose the server for an attempt.

        Raises:
            ConnectError: There are several servers, and none can be used.
        """
        servers = self._servers
        if servers is None:
            return Lease(self)
        self.require_open()
        await self._resolve(servers)
        causes = servers.unresolved()
        while True:
            member = servers.choose(attempts.avoid, {*causes, *attempts.unusable})
            if member is None:
                raise none_left(causes, attempts.unusable)
            lease = Lease(member.engine, servers, member, attempts)
            if not member.needs_probe:
                return lease
            try:
                info = await member.engine._probe(at_most(ASK_S, attempts.left_s))
                require_jobs(info, member.address)
            except GradwireError as error:
                causes[member.address] = error
                lease.ended(error)
            except BaseException as error:
                lease.ended(error)
                raise
            else:
                member.devices = max(1, len(info.devices))
                servers.mark_healthy(member)
                self._learn_features(servers.engines())
                return lease

    async def spread(
        self, spread: SpreadPlan, left_s: float | None, *, several: bool = True
    ) -> int:
        """Plan a product for all servers that compute alike.

        Servers that have not answered yet are asked about themselves now, unless they
        are ejected. Those that have other numerics than most get no segments.

        Args:
            spread: The plan.
            left_s: Seconds that the product has left; None: no limit.
            several: Whether a job may take several segments.

        Returns:
            Jobs at the same time.

        Raises:
            NumericsError: No server computes segments.
            ConnectError: No server answered.
        """
        self.require_open()
        engines = {self.address: self}
        if self._servers is not None:
            engines = await self._asked(self._servers, left_s)
        elif self.info is None:
            await self._probe(within(self.connect_timeout_s, left_s))
        spread.choose_numerics(
            {
                address: numerics_of(each.info)
                for address, each in engines.items()
                if each.info is not None
            }
        )
        # A job in shared memory has one segment.
        several = several and SEGMENTS in self.jobs.features and not self.shm.on
        spread.divide(several=several)
        return self.jobs_at_once(spread)

    async def _asked(
        self, servers: LoadBalancer[AsyncEngine], left_s: float | None
    ) -> dict[str, AsyncEngine]:
        """Ask the servers that have not answered yet about themselves.

        Returns:
            The engines of all servers, by address; without those that are ejected, if
            there are others.

        Raises:
            ConnectError: No server has ever answered.
        """
        await self._resolve(servers)
        causes = servers.unresolved()
        asked = servers.members  # other threads may replace them
        known = any(each.engine.info is not None for each in asked)
        timeout_s = within(ASK_S if known else self.connect_timeout_s, left_s)

        def wanted(member: ServerState[AsyncEngine]) -> bool:
            unknown = member.engine.info is None
            return unknown and not (known and servers.is_ejected(member))

        with servers.held(wanted) as members:
            first = await self._ask_all(servers, members, timeout_s, causes)
        if first is None and not known:
            raise none_left(causes)
        asked = [*asked, *members, *servers.members]
        there = [
            each
            for each in asked
            if each.engine.info is not None and not servers.is_ejected(each)
        ]
        asked = there or asked
        return {member.address: member.engine for member in asked}

    def has_changed(self, unusable: Set[str]) -> bool:
        """Return whether only those servers are left, as if others had replaced all."""
        there = self.usable_servers(())
        return bool(there) and there <= unusable

    def jobs_at_once(self, spread: SpreadPlan) -> int:
        """Return how many jobs of a spread product run at the same time."""
        devices = max(1, sum(self._devices(spread.unusable)))
        return spread.division.jobs_per_device * devices

    def usable_servers(self, unusable: Collection[str]) -> Set[str]:
        """Return the addresses of the servers beside those, unless they are ejected."""
        if self._servers is None:
            return {self.address}
        return {
            each.address
            for each in self._servers.members
            if each.address not in unusable and not self._servers.is_ejected(each)
        }

    def server_count(self, unusable: Collection[str]) -> int:
        """Return the number of servers beside those, also if they are ejected."""
        if self._servers is None:
            return 1
        return sum(each.address not in unusable for each in self._servers.members)

    def _devices(self, unusable: Collection[str]) -> list[int]:
        """Return the number of devices of each server that can be used."""
        if self._servers is not None:
            return self._servers.devices(unusable)
        return [1 if self.info is None else len(self.info.devices)]

    async def set_servers(self, addresses: Sequence[str]) -> None:
        """Use other servers from now on, see `AsyncClient.set_servers`.

        Raises:
            InputError: An address is invalid, or the client has one server.
        """
        self.require_open()
        servers = self._servers
        if servers is None:
            raise InputError(
                f"this client is for the server at {self.address} alone: create it with"
                " a list of addresses, to change them later"
            )
        found = parse_addresses(addresses)
        if found.names:
            raise InputError(
                f"addresses has {found.names[0]!r}: expected addresses, not names that"
                " have several"
            )
        tls, token = self._options.get("tls"), self._options.get("token")
        Endpoints(found, tls, token).require_private(self.jobs.metadata)
        servers.replace(found.known)
        self.address = found.text
        for gone in servers.idle_gone():
            await gone.aclose()

    def call(
        self,
        job: StreamJob,
        batches: AsyncGenerator[Mapping[Matrix, Operand]],
        attempts: Attempts,
    ) -> AsyncCall:
        """Begin an attempt of a stream's job on this engine's server.

        Args:
            job: The job.
            batches: Yields the job's rows, from its `first_row` on.
            attempts: The call's attempts.
        """
        job.address = self.address
        if attempts.span is not None:
            attempts.span.sent_to(self.address)
        exchange = job.begin(self.direct.connections(job.plan, several=False))
        return AsyncCall(
            self._connection(),
            exchange,
            lambda: stream_messages(job, exchange, batches),
            attempts.options(job.options),
        )

    async def open_direct(self, job: StreamJob, call: AsyncCall) -> None:
        """Open the direct connection that the server offers for a stream."""
        instance = job.exchange.server_instance
        connections = await self._open_direct(job.exchange, instance, call)
        if connections is not None:
            job.use_direct(DirectStream(connections[0], call, self.address))
            call.wake()  # the next message may be the last

    def keep_direct(self, job: StreamJob, receipt: Receipt) -> None:
        """Keep the direct connection of a stream that has ended well."""
        direct, job.direct = job.direct, None
        if direct is not None:
            self.direct.reuse(receipt.server_instance, [direct.connection])

    def note_broken(self, job: StreamJob | None, error: GradwireError) -> None:
        """Note whether the direct connection of a failed attempt broke."""
        direct = None if job is None else job.direct
        if direct is not None and direct.broken is not None:
            self.direct.failed(error)

    async def session_call(
        self,
        name: str,
        request: Any,
        timeout_s: float | None,
        attempts: Attempts | None = None,
        affinity: str = "",
    ) -> Any:
        """Call a method of the sessions of this engine's server.

        Args:
            name: The method.
            request: Its request.
            timeout_s: Timeout in seconds; None: no limit.
            attempts: The call's attempts; None: it is not traced.
            affinity: What a proxy recognizes the session's calls by, without attempts.

        Raises:
            GradwireError: The call failed.
        """
        metadata = self.jobs.metadata_of(affinity)
        if attempts is not None:
            metadata = self._traced(attempts)
        return await self._connection().session_call(name, request, timeout_s, metadata)

    async def call_once(self, name: str, request: Any, address: str | None) -> Any:
        """Call a method of the sessions on a server, with retries.

        Args:
            name: The method.
            request: Its request.
            address: The server's address; None: the server of the next job.

        Raises:
            InputError: There is no server at that address.
            GradwireError: The call failed.
        """
        if address is not None:
            engine = await self._engine_at(address)
            if engine is not self:
                return await engine.call_once(name, request, None)
        attempts = self.session_attempts(name, self.jobs.timeout_s)

        async def attempt() -> Any:
            with await self.lease(attempts) as lease:
                return await lease.engine.session_call(
                    name, request, attempts.left_s, attempts
                )

        return await self.retry(attempts, attempt)

    async def put_tensor(
        self,
        header: TensorHeader,
        elements: Operand | None,
        attempts: Attempts,
        server_instance: str,
    ) -> None:
        """Put a tensor into a session of this engine's server.

        Args:
            header: The tensor's header.
            elements: Its elements; None if they are all 0, or perhaps not needed.
            attempts: The call's attempts.
            server_instance: The session's server process.

        Raises:
            GradwireError: The call failed.
        """
        direct = elements is not None and self.direct.suits_tensor(elements.size_bytes)
        exchange = PutExchange(header, elements, direct=direct)
        if direct:
            await self._move_tensor(exchange, attempts, server_instance)
        else:
            metadata, left_s = self._traced(attempts), attempts.left_s
            requests = exchange.requests()
            response = await self._connection().put_tensor(requests, left_s, metadata)
            exchange.receive(response)
        exchange.finish()

    async def get_tensor(
        self,
        request: GetTensorRequest,
        size_bytes: int,
        attempts: Attempts,
        server_instance: str,
    ) -> Array:
        """Get a tensor of a session of this engine's server.

        Args:
            request: The request.
            size_bytes: Bytes of its elements.
            attempts: The call's attempts.
            server_instance: The session's server process.

        Raises:
            GradwireError: The call failed.
        """
        direct = self.direct.suits_tensor(size_bytes)
        exchange = GetExchange(request, self.jobs.memory, direct=direct)
        if direct:
            await self._move_tensor(exchange, attempts, server_instance)
        else:
            metadata, left_s = self._traced(attempts), attempts.left_s
            await self._connection().get_tensor(
                exchange.opening(), exchange.receive, left_s, metadata
            )
        return exchange.finish()

    async def _move_tensor(
        self, exchange: TensorExchange, attempts: Attempts, server_instance: str
    ) -> None:
        """Send or receive the elements of a tensor, directly if that is possible."""
        options = CallOptions(attempts.left_s, self._traced(attempts))
        async with AsyncCall(
            self._connection(),
            exchange,
            lambda: iterate(exchange.messages()),
            options,
            exchange.method,
        ) as call:
            async for message in call:
                exchange.receive(message)
                connections = await self._open_direct(exchange, server_instance, call)
                if connections is not None:
                    begin = partial(_begin_tensor, exchange)
                    await self._transfer(connections, call, exchange, begin)
                    self.direct.reuse(server_instance, connections)
                    return

    async def allocate(self, sizes: Sequence[int]) -> list[Allocation] | None:
        """Allocate shared memory.

        Args:
            sizes: Bytes of each allocation.

        Returns:
            The allocations; None if the server shares no more memory.

        Raises:
            ClientStateError: The client was closed.
            GradwireError: The server shares no more memory, with ``transport="shm"``.
        """
        if not sizes:
            return []
        connection, pool = self._connection(), self.shm.pool
        allocations = pool.allocate(sizes)
        if allocations is not None:
            return allocations
        to_open = pool.bytes_to_open(sizes)
        for size_bytes in to_open:
            try:
                segment = await connection.open_segment(size_bytes, self.jobs.metadata)
            except GradwireError as error:
                self.require_open()  # otherwise that is why
                if size_bytes != to_open[-1] and may_be_smaller(error):
                    continue
                self.shm.on_refusal(error)
                if self.shm.demanded:
                    raise
                break
            return pool.add(segment, sizes)
        return None

    async def sleep(self, seconds: float) -> None:
        """Wait, at most until the client is closed."""
        await self._closing.wait(seconds)

    async def aclose(self) -> None:
        """Close the connections and cancel running calls."""
        self.closed = True
        self._closing.set()
        for member in self._servers.engines() if self._servers else ():
            await member.aclose()
        self.shm.pool.close()
        self.direct.close()
        self.jobs.memory.close()
        await self._connector.aclose()

    def after_fork(self) -> None:
        """Reset the state in the child of a fork.

        The child must neither use nor close the parent's shared memory and locks.
        """
        _inherited.append(self.shm.after_fork())
        self.direct.after_fork()
        self.jobs.after_fork()
        self._closing = AsyncFlag()
        if self.closed:
            self._closing.set()
        self.retries.renew()
        if self._servers is not None:
            self._servers.renew()

    async def _execute_checked(self, job: ArrayJob, attempts: Attempts) -> Receipt:
        """Compute a job, and check its results if that is wanted."""
        receipt = await self._execute(job, attempts)
        if attempts.span is not None:
            attempts.span.computed(receipt)
        if job.to_verify:
            return await run_beside(lambda: job.verified(receipt, self.address))
        return job.verified(receipt, self.address)

    async def _execute(self, job: ArrayJob, attempts: Attempts) -> Receipt:
        """Compute a job on this engine's server, in the fastest way."""
        options = job.plan.options
        if attempts.span is not None:
            attempts.span.sent_to(self.address)
        if self._should_use_shm(job):
            receipt = await self._run_in_shm(job, attempts)
            if receipt is not None:
                return receipt
        if job.unary and not self.direct.demanded:
            return await self._compute(job, attempts.options(options))
        while True:
            exchange = job.exchange(self.direct.connections(job.whole, several=True))
            try:
                return await self._stream(job, exchange, attempts.options(options))
            except GradwireError as error:
                if not job.cut_off(exchange, error, attempts):
                    raise

    async def _compute(self, job: ArrayJob, options: Options) -> Receipt:
        connection, exchange = self._connection(), job.unary_exchange()
        request = exchange.request(job.operands)
        response = await connection.compute(request, options, job.on_call)
        return exchange.receive(response)

    async def _stream(
        self, job: ArrayJob, exchange: JobExchange, options: Options
    ) -> Receipt:
        async with AsyncCall(
            self._connection(),
            exchange,
            lambda: iterate(job.messages(exchange)),
            options,
        ) as call:
            if job.source is not None:  # others would live as long as the call
                job.wake = call.wake
            if job.on_call is not None:
                job.on_call(call.abandon)
            async for message in call:
                exchange.receive(message)
                instance = exchange.server_instance
                connections = await self._open_direct(exchange, instance, call)
                if connections is not None:
                    return await self._transfer_job(job, exchange, call, connections)
            return exchange.finish()

    async def _open_direct(
        self,
        exchange: JobExchange | TensorExchange,
        server_instance: str,
        call: AsyncCall,
    ) -> list[DirectConnection] | None:
        """Open the direct connections that the server has offered, if it has.

        Args:
            exchange: The call's exchange.
            server_instance: The server process.
            call: The call.

        Returns:
            The connections; None if there are none, and the elements are in messages.

        Raises:
            DeadlineError: They were not open by the call's deadline.
            ConnectError: They cannot be opened, with ``transport="direct"``.
        """
        offered = exchange.offered
        if offered is None:
            return None
        try:
            connections = await run_beside(
                partial(self.direct.open, offered, server_instance, call.deadline)
            )
        except TimeoutError:
            raise call.late() from None
        if connections is None:
            exchange.use_messages()
        return connections

    async def _transfer_job(
        self,
        job: ArrayJob,
        exchange: JobExchange,
        call: AsyncCall,
        connections: Sequence[DirectConnection],
    ) -> Receipt:
        """Compute an accepted job whose elements are on direct connections."""

        def begin(transfer: DirectTransfer) -> None:
            direct = exchange.use_direct(job.sinks, source=job.source)
            transfer.start(direct, job.operands, job.interrupt)

        await self._transfer(connections, call, exchange, begin)
        try:
            receipt = exchange.finish()
        except GradwireError:
            for each in connections:
                each.close()
            raise
        self.direct.reuse(receipt.server_instance, connections)
        return receipt

    async def _transfer(
        self,
        connections: Sequence[DirectConnection],
        call: AsyncCall,
        exchange: JobExchange | TensorExchange,
        begin: Callable[[DirectTransfer], None],
    ) -> None:
        """Move elements on direct connections until their call has ended.

        Args:
            connections: The connections.
            call: The call.
            exchange: Takes its messages.
            begin: Begins the transfer.
        """
        transfer = DirectTransfer(connections, call, self.address)
        try:
            begin(transfer)
            async for message in call:
                exchange.receive(message)
            await run_beside(transfer.finish)
        except BaseException as error:
            try:
                if isinstance(error, GradwireError):
                    await run_beside(partial(transfer.end_with, error))
                else:
                    # First: the server would take closed connections for the cause.
                    await call.cancel()
            finally:  # also if the caller gives up meanwhile
                transfer.close()
            if transfer.broken is not None:
                if isinstance(error, ClientIdleError):  # the server waited in vain
                    self.direct.failed(transfer.lost())
                    raise transfer.lost() from error
                self.direct.failed(error)
            raise

    async def _run_in_shm(
        self, job: ArrayJob, attempts: Attempts, *, again: bool = True
    ) -> Receipt | None:
        """Compute a job in shared memory; None if it has to travel in messages."""
        shared = self.shm.place(job.plan, job.operands, job.outputs)
        allocations = await self.allocate(shared.sizes)
        if allocations is None:
            return None
        shared.place(allocations)
        if attempts.span is not None:
            attempts.span.in_shared_memory()
        await _copy(shared, shared.copy_in)
        exchange = shared.exchange()
        options = attempts.options(job.plan.options)
        try:
            async with AsyncCall(
                self._connection(),
                exchange,
                lambda: iterate(exchange.messages()),
                options,
            ) as call:
                if job.on_call is not None:
                    job.on_call(call.abandon)
                async for message in call:
                    exchange.receive(message)
                receipt = exchange.finish()
        except BaseException as error:
            regions_lost = shared.worth_another_try(error)
            if not regions_lost or not again:
                if regions_lost and self.shm.may_do_without():
                    return None
                if shared.at_risk:
                    attempts.make_final()
                raise
        else:
            await _copy(shared, shared.copy_out)
            return receipt
        return await self._run_in_shm(job, attempts, again=False)

    async def _probe(self, timeout_s: float | None) -> ServerInfo:
        """Ask the server about itself, and check that this client can use it.

        Raises:
            ConnectError: The server does not answer, or cannot be used.
        """
        return self._learn(await self._server_info(timeout_s, connecting=True))

    async def _ask(self, timeout_s: float | None) -> ServerInfo | Exception:
        """Ask the server about itself, and return an error instead of raising it."""
        try:
            return require_jobs(await self._probe(timeout_s), self.address)
        except Exception as error:  # noqa: BLE001 - the caller raises it
            return error

    async def _server_info(
        self, timeout_s: float | None, *, connecting: bool = False
    ) -> ServerInfo:
        connection, metadata = self._connection(), self.jobs.metadata
        return server_info_of(
            await connection.server_info(timeout_s, metadata, connecting=connecting)
        )

    async def _resolve(self, servers: LoadBalancer[AsyncEngine]) -> None:
        """Look up the names whose addresses may have changed."""
        for name in servers.names_due():
            host, port = host_and_port(name)
            try:
                found = await look_up(host, port)
            except OSError as error:
                servers.not_resolved(name, error)
                continue
            servers.resolved(name, addresses_of(port, found))
        for gone in servers.idle_gone():
            await gone.aclose()

    async def _engine_at(self, address: str) -> AsyncEngine:
        """Return the engine of one server.

        Raises:
            InputError: There is no server at that address.
        """
        if self._servers is None:
            return look_up_address(address, {self.address: self})
        await self._resolve(self._servers)
        members = self._servers.members
        return look_up_address(address, {each.address: each.engine for each in members})

    async def retry(self, attempts: Attempts, attempt: Callable[[], Awaitable[R]]) -> R:
        """Return the result of the first successful attempt.

        Raises:
            GradwireError: The last attempt failed.
        """
        try:
            while True:
                try:
                    result = await attempt()
                except GradwireError as error:
                    delay_s = attempts.after(error)
                    if delay_s is None:
                        raise
                else:
                    attempts.succeeded()
                    if attempts.span is not None:
                        attempts.ended()
                    return result
                await self.sleep(delay_s)
        except BaseException as error:
            attempts.ended(error)
            raise

    def _traced(self, attempts: Attempts) -> MetadataPairs:
        """Return the metadata of an attempt of a session's call on this server."""
        if attempts.span is not None:
            attempts.span.sent_to(self.address)
        return self.jobs.metadata_of(attempts.affinity) + attempts.metadata

    def _connection(self) -> AsyncConnection:
        """Return the connection to the server, and create it if necessary.

        Raises:
            ClientStateError: The client is closed, or cannot make calls here.
        """
        self.require_open()
        return self._connector.connection()


_inherited: list[Pool] = []
"""The shared memory of the parents of this process, kept open."""


async def _copy(shared: ShmJob, copy: Callable[[], None]) -> None:
    """Copy elements beside the event loop; a call without copies needs no thread."""
    if shared.copies:
        await run_beside(copy)
    else:
        copy()


def _begin_tensor(exchange: TensorExchange, transfer: DirectTransfer) -> None:
    exchange.use_direct()
    transfer.start(exchange, {})


async def stream_messages(
    job: StreamJob,
    exchange: JobExchange,
    batches: AsyncGenerator[Mapping[Matrix, Operand]],
) -> AsyncGenerator[bytes]:
    """Yield the messages of a stream after its header, and send its frames."""
    thread = AsyncThread("gradwire-stream-up")
    try:
        async for part in _parts(job, exchange, batches):
            if isinstance(part, bytes):
                yield part
            elif not await thread.run(partial(_sent, job, exchange, part)):
                while True:  # the call has failed, or is about to
                    yield WAIT
    finally:
        thread.close()


def _sent(job: StreamJob, exchange: JobExchange, frame: Frame) -> bool:
    """Send a frame, and return whether that succeeded."""
    direct = job.direct
    # The next attempt, with a connection of its own, may have begun.
    if direct is None or job.exchange is not exchange:
        return False
    return direct.send(frame)


async def _parts(
    job: StreamJob,
    exchange: JobExchange,
    batches: AsyncGenerator[Mapping[Matrix, Operand]],
) -> AsyncGenerator[Message]:
    for message in job.opening_messages(exchange):
        yield message
    async for operands in batches:
        for message in exchange.row_messages(operands):
            yield message
    for message in exchange.end_messages():
        yield message
