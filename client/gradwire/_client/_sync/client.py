"""The client for programs that wait: `connect` and `Client`."""

from __future__ import annotations

import socket
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # not in its stubs

from gradwire._api.errors import GradwireError
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
from gradwire._arrays.buffer_pool import ResultPool
from gradwire._client._sync.stream import GradientStream
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
from gradwire._transport.grpc.grpc_errors import call_error, connect_error
from gradwire._transport.grpc.sync_call import Call, Connection, call_unary
from gradwire._transport.shm.policy import EmptyArray, may_be_smaller
from gradwire._transport.shm.segments import Allocation, Pool
from gradwire._transport.tls import Tls
from gradwire_protocol.matrices import RESULTS, Matrix
from gradwire_protocol.v1.gradient_service_pb2 import (
    GetServerInfoRequest,
    GetServerInfoResponse,
)

_Result = TypeVar("_Result")


def connect(
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
) -> Client:
    """A client of the server at an address, once it has answered.

    Args:
        address: ``HOST:PORT`` or ``unix:PATH``. Or several of them, or
            ``dns:///HOST:PORT`` for every address that a name has: each job
            goes to the server that has the fewest of this client's, and one
            that fails is left out for a while and its job tried elsewhere, as
            `retries` has it (docs/several-servers.md).
        connect_timeout_s: Seconds that the server has to answer.
        timeout_s: Seconds for every call that names none itself; None: as
            long as it takes.
        metadata: Sent with every call: ``{"traceparent": "00-..."}``.
        transport: How elements travel. "tcp": in messages, over whatever the
            address names. "shm": through memory that the server shares,
            which it must allow; see `Client.empty`. "auto": through shared
            memory where the server allows it and is surely on this host.
        tls: None: everything goes in plaintext, which is for this host and
            networks that you trust; an ``authorization`` in the metadata is
            refused on others. True: over TLS, to a server whose certificate
            an authority that the system trusts has signed. A `Tls` names
            other authorities, and the client's own certificate.
        token: Sent with every call to a server that asks for one: a string,
            or what returns one, which is asked at each call, so that it may
            be renewed. What it raises is raised by the call. It is refused
            where it would go to another host in plaintext.
        retries: When a call that failed is made again: by default as
            `RetryPolicy` has it; False: never.
        verify: Whether results are checked on this side, for every call that
            does not say itself; see `Client.gradients`.

    Raises:
        InputError: The address or the transport is none, or a file of `tls`
            or the token cannot be used.
        ConnectError: Nobody answers there (at none of several addresses), or
            what does is no gradwire server (`ContractError`: none of this
            version of the contract), or none to be trusted (`TlsError`), or
            memory that is demanded cannot be shared with it.

    Example:
        >>> with gradwire.connect("gpu-node:50051") as client:
        ...     y, dx, dw = client.gradients(x, w, dy)
    """
    client = Client(
        address,
        timeout_s=timeout_s,
        metadata=metadata,
        transport=transport,
        tls=tls,
        token=token,
        retries=retries,
        verify=verify,
    )
    try:
        client.handshake(connect_timeout_s)
    except BaseException:
        client.close()
        raise
    return client


class Client(BaseClient):
    """A server's gradients, for programs that wait.

    Making one does no I/O: the connection is made by the first call, and
    again after it broke or the process forked. Threads may share a client;
    their calls run side by side.

    Args:
        address: ``HOST:PORT`` or ``unix:PATH``, or several; see `connect`.
        timeout_s: Seconds for every call that names none itself; None: as
            long as it takes.
        metadata: Sent with every call.
        transport: As for `connect`; "auto" is "tcp" before a `handshake`.
        tls: Whether and how the server proves who it is; see `connect`.
        token: Sent with every call; see `connect`.
        retries: When a call that failed is made again; see `connect`.
        verify: How results are checked here; see `connect`.

    Raises:
        InputError: The address or the transport is none, or a file of `tls`
            or the token cannot be used.

    Example:
        >>> client = gradwire.Client("unix:/run/gradwire.sock", timeout_s=60)
        >>> y = client.forward(x, w)
        >>> client.close()
    """

    def __init__(
        self,
        address: str | Sequence[str],
        *,
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
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._connected: Connection | None = None
        self._servers: LoadBalancer[Client] | None = None
        if self._endpoints is not None:
            tls_of = self._endpoints.tls_of

            def member(address: str, name: str | None) -> Client:
                return Client(
                    address,
                    metadata=metadata,
                    transport="tcp",
                    tls=tls_of(name),
                    token=token,
                    retries=retries,
                )

            known, names = self._addresses.known, self._addresses.names
            self._servers = LoadBalancer(member, known, names)
        _clients.add(self)

    def __enter__(self) -> Client:
        self._require_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls that still run are cancelled."""
        with self._lock:
            self._closed = True
            self._closing.set()
            connected, self._connected = self._connected, None
        for member in self._servers.all_clients() if self._servers else ():
            member.close()
        self._sharing.pool.close()
        self._memory.close()
        if connected is not None:
            with fork_support.calling():
                connected.channel.close()

    def handshake(self, connect_timeout_s: float | None = 10.0) -> ServerInfo:
        """Ask the server what it is, and refuse to go on with a wrong one.

        Of several servers, one has to answer; what it says is returned. Those
        that do not within a second after it are left out for now.

        Raises:
            ConnectError: As for `connect`.
        """
        seconds = parse_timeout(connect_timeout_s, "connect_timeout_s")
        if self._servers is not None:
            return self._handshakes(self._servers, seconds)
        info = self._probe(seconds)
        if self._sharing.demanded:
            self._allocate([1])
        return info

    def server_info(
        self, *, timeout_s: float | None = None, address: str | None = None
    ) -> ServerInfo:
        """What the server is, offers and allows.

        Args:
            timeout_s: Seconds that it has to answer.
            address: Of several, which one (see `addresses`); None: the one to
                which the next job would go.

        Raises:
            InputError: There is none of that address.
            CallError: It did not say.

        Example:
            >>> client.server_info().limits.max_jobs
            64
        """
        seconds = parse_timeout(timeout_s, "timeout_s") or self._timeout_s
        if address is not None:
            client = self._client_for(address)
            if client is not self:
                return client.server_info(timeout_s=seconds)
        attempts = Attempts(self._retries, seconds)

        def attempt() -> ServerInfo:
            with self._lease(attempts) as lease:
                try:
                    return server_info_of(lease.client._info(attempts.left_s))
                except grpc.RpcError as error:
                    raise call_error(error, lease.client._endpoint) from None

        return self._retried(attempts, attempt)

    def empty(self, shape: int | Sequence[int], dtype: DtypeLike = "float32") -> Array:
        """An array whose elements need not travel.

        It lies in memory that the server shares, where that is so, and is an
        ordinary array otherwise. As an operand or as `out` of `gradients`,
        `forward` and `backward` it, and every C-contiguous part of it that
        begins at a multiple of 64 bytes, is used in place; other operands are
        copied there first. Its memory is used again when its last view has
        died, and stays valid when the client is closed. A job that reads it
        must have ended before it is changed.

        After a job failed without a word of the server's (its deadline
        passed, it was cancelled, the connection broke), arrays that were its
        `out` may still be written to for as long as a row block takes, and
        they are ordinary arrays from then on; so such a job is not tried again.

        Args:
            shape: A number or numbers.
            dtype: One that gradwire computes.

        Returns:
            An array, not initialised.

        Raises:
            InputError: The shape or the dtype is none.
            GradwireError: ``transport="shm"``, and the server has no more
                memory.

        Example:
            >>> x = client.empty((4096, 1024))
            >>> x[:] = rows
            >>> y = client.forward(x, w)
        """
        self._require_open()
        wanted = EmptyArray(shape, dtype)
        return wanted.made(self._allocate(wanted.sizes) if self._sharing.on else None)

    def gradients(
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
        """Y = X W, dX = dY Wᵀ and dW = Xᵀ dY, as far as they are wanted.

        Args:
            x: X, shape (..., n): leading dimensions count as rows.
            w: W, shape (n, k).
            dy: dY = dL/dY, shape (..., k), with leading dimensions like X's.
                All operands have one dtype: float16, bfloat16, float32 or
                float64. Nested lists of Python floats are float64. Anything
                that NumPy can read is taken, in any layout; CuPy arrays,
                PyTorch's CUDA tensors and what else DLPack can copy to host
                memory are copied, as `Receipt.host_copy_bytes` says.
                What the wanted results do not need may be None.
            results: Any of ``"y"``, ``"dx"``, ``"dw"``.
            out: Where results go: a mapping such as ``{"dw": array}``, or a
                tuple (y, dx, dw) with None for those to be made. NumPy or
                CuPy arrays or PyTorch tensors, on any device, of the results'
                shapes and dtypes. After a failure their contents are
                undefined.
            result_dtype: Of the results: one for all, or a mapping such as
                ``{"dw": "float32"}``. Else they have the operands' dtype.
            wire_dtype: ``"bfloat16"`` or ``"float16"``, for float32 operands:
                they are rounded to it as they are sent, and results that
                `result_dtype` does not name come back in it and are widened
                to float32, so that half the bytes travel. docs/gradients.md
                says how much that may lose. A result too large for it is
                Inf; an operand too large for it, unless it is Inf itself,
                raises InputError and cancels the job.
            dw_accumulator: ``"float32"`` or ``"float64"``, in which dW is
                summed over row blocks.
            allow_tf32: Whether float32 products may use TF32.
            checksum: Whether every payload is protected by a CRC-32C.
            verify: Whether results are checked on this side, by random sums
                that cost O(m n + n k + m k): True, a number of rounds, or a
                `Verify`; None: as the client has it. docs/gradients.md says
                what it finds.
            timeout_s: Seconds for the whole call.
            on_progress: Called with a `Progress` now and then, never twice
                at a time, maybe from another thread. What it raises cancels
                the job and is raised here.
            request_id: The job's id in the server's log, in the receipt and
                in errors: 1 to 128 printable ASCII characters.
            metadata: Sent with the call: ``{"traceparent": "00-..."}``.
            checkpoint_rows: How many rows there are at least between two sums
                of dW that the server sends, so that a job that is cut off
                goes on from there (docs/failing.md); each is as large as dW.
                0: it sends one if it stops. None: as is best.

        Returns:
            The tuple (y, dx, dw) of NumPy arrays of shapes (..., k), (..., n)
            and (n, k), or what `out` gave; None for those not wanted. Its
            `receipt` says what became of the job.

        Raises:
            InputError: An argument is refused; nothing was sent.
            GradwireError: The job failed; see the tree.
            VerificationError: A result is wrong, as `verify` has found.

        Example:
            >>> y, dx, dw = client.gradients(x, w, dy)
            >>> client.gradients(x, None, dy, results="dw").dw.shape
            (784, 10)
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
        receipt = self._run(job)
        y, dx, dw = job.results(*RESULTS)
        return Gradients(y, dx, dw, receipt)

    def forward(
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
        """Y = X W alone; see `gradients` for the arguments.

        Returns:
            Y, shape (..., k); or `out`, where that was given.

        Raises:
            InputError: An argument is refused; nothing was sent.
            GradwireError: The job failed; see the tree.

        Example:
            >>> client.forward(x, w).shape
            (60000, 10)
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
        self._run(job)
        return job.results(Matrix.Y)[0]

    def backward(
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
        """The two gradients, dX = dY Wᵀ and dW = Xᵀ dY; see `gradients`.

        Returns:
            The tuple (dx, dw) of shapes (..., n) and (n, k).

        Raises:
            InputError: An argument is refused; nothing was sent.
            GradwireError: The job failed; see the tree.

        Example:
            >>> dx, dw = client.backward(x, w, dy)
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
        receipt = self._run(job)
        dx, dw = job.results(Matrix.DX, Matrix.DW)
        return Backward(dx, dw, receipt)

    def stream(
        self,
        rows: Iterable[Any],
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
    ) -> GradientStream:
        """The gradients of rows that need not be there all at once.

        Both sides hold a few blocks of rows, however many rows there are.

        Args:
            rows: An iterable of pairs (x_rows, dy_rows) of shapes (r, n) and
                (r, k), with any r from item to item; None for the one that
                the wanted results do not need, or that which they do need
                alone. Its first item is asked for in the caller's thread, the
                others in another, ahead of the results. An item's memory may
                be used again once the next is asked for; but a sequence's
                items are asked for again where the job goes on after it was
                cut off, while other rows are copied for that
                (docs/failing.md). What the iterable raises cancels the job
                and is raised here.
            w: W, shape (n, k); None where only dW is wanted.
            m: Number of all rows, where it is known.
            results: Any of ``"y"``, ``"dx"``, ``"dw"``.
            result_dtype: As for `gradients`.
            wire_dtype: As for `gradients`.
            dw_accumulator: As for `gradients`.
            allow_tf32: As for `gradients`.
            checksum: As for `gradients`.
            verify: As for `gradients`. A block is checked before it is handed
                out, and dW at the end.
            timeout_s: Seconds for the whole stream.
            on_progress: As for `gradients`.
            request_id: As for `gradients`.
            metadata: As for `gradients`.
            checkpoint_rows: As for `gradients`.

        Returns:
            An iterator of `RowBlock`, which has `dw` and `receipt` once it
            is exhausted. Nothing is sent before it is iterated. Left early,
            by `break`, an exception or garbage collection, it cancels its
            job; as a context manager it does so at once.

        Raises:
            InputError: An argument is refused. One that only the iterable's
                items show to be wrong is refused while iterating.
            RowsLostError: While iterating: the job was cut off, and rows that
                are needed again are held no more.

        Example:
            >>> with client.stream(zip(x_parts, dy_parts), w) as stream:
            ...     for block in stream:
            ...         save(block.first_row, block.y, block.dx)
            >>> stream.dw.shape
            (784, 10)
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
        return GradientStream(self, rows, reader)

    def _run(self, job: ArrayJob) -> Receipt:
        attempts = self._attempts(job.plan.options)
        receipt = self._retried(attempts, partial(self._attempt, job, attempts))
        return self._remember_receipt(job.delivered(attempts.annotate(receipt)))

    def _attempt(self, job: ArrayJob, attempts: Attempts) -> Receipt:
        """Compute a job, once, on the server that is best for it."""
        with self._lease(attempts) as lease:
            receipt = lease.client._execute(job, attempts)
            return job.verified(receipt, lease.client.address)

    def _lease(self, attempts: Attempts) -> Lease[Client]:
        """A server for an attempt.

        Raises:
            ConnectError: There are several, and none can be had.
        """
        servers = self._servers
        if servers is None:
            return Lease(self)
        self._require_open()
        self._resolve(servers)
        causes = servers.unresolved()
        while (member := servers.choose(attempts.avoid, causes)) is not None:
            lease = Lease(member.client, servers, member, attempts)
            if not member.needs_probe:
                return lease
            try:
                info = member.client._probe(at_most(ASK_S, attempts.left_s))
                require_jobs(info, member.address)
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

    def _resolve(self, servers: LoadBalancer[Client]) -> None:
        """Look up the names whose addresses may have changed."""
        for name in servers.names_due():
            host, port = host_and_port(name)
            try:
                found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            except OSError as error:
                servers.not_resolved(name, error)
                continue
            for gone in servers.resolved(name, addresses_of(port, found)):
                gone.close()

    def _probe(self, timeout_s: float | None) -> ServerInfo:
        """What the server says that it is, if it is one to go on with.

        Raises:
            ConnectError: It does not answer, or it is not.
        """
        try:
            answer = self._info(timeout_s)
        except grpc.RpcError as error:
            raise connect_error(error, self._endpoint, timeout_s or 0) from None
        return self._require_contract(server_info_of(answer))

    def _handshakes(
        self, servers: LoadBalancer[Client], timeout_s: float | None
    ) -> ServerInfo:
        """Ask all servers, side by side."""
        self._resolve(servers)
        members = servers.members
        answers: SimpleQueue[tuple[ServerState[Client], ServerInfo | GradwireError]]
        answers = SimpleQueue()

        def ask(member: ServerState[Client]) -> None:
            try:
                info = member.client._probe(timeout_s)
                answers.put((member, require_jobs(info, member.address)))
            except GradwireError as error:
                answers.put((member, error))

        for member in members:
            member.needs_probe = True
            threading.Thread(target=ask, args=(member,), daemon=True).start()
        first: ServerInfo | None = None
        causes = servers.unresolved()
        for _ in members:
            try:
                member, answer = answers.get(timeout=None if first is None else ASK_S)
            except Empty:
                break
            if isinstance(answer, GradwireError):
                causes[member.address] = answer
                servers.record_failure(member, answer)
            else:
                servers.mark_healthy(member)
                first = first or answer
        if first is None:
            raise none_left(causes)
        self._learn_of(servers.all_clients())
        return first

    def _client_for(self, address: str) -> Client:
        """The client of one server."""
        if self._servers is None:
            return self._lookup(address, {self._address: self})
        self._resolve(self._servers)
        members = self._servers.members
        return self._lookup(address, {each.address: each.client for each in members})

    def _retried(self, attempts: Attempts, attempt: Callable[[], _Result]) -> _Result:
        """What the first attempt gives that does not fail, or is the last."""
        while True:
            try:
                result = attempt()
            except GradwireError as error:
                delay_s = attempts.after(error)
                if delay_s is None:
                    raise
            else:
                attempts.succeeded()
                return result
            self._sleep(delay_s)

    def _sleep(self, seconds: float) -> None:
        """Wait, unless the client is closed meanwhile."""
        self._closing.wait(seconds)

    def _execute(self, job: ArrayJob, attempts: Attempts) -> Receipt:
        """Compute a job, once."""
        options = job.plan.options
        if self._shares(job):
            receipt = self._run_shared(job, attempts)
            if receipt is not None:
                return receipt
        if job.unary:
            return self._compute(job, attempts.options(options))
        while True:
            exchange = job.exchange()
            try:
                return self._stream(job, exchange, attempts.options(options))
            except GradwireError as error:
                if not job.cut_off(exchange, error, attempts):
                    raise

    def _stream(
        self, job: ArrayJob, exchange: JobExchange, options: Options
    ) -> Receipt:
        messages = partial(job.messages, exchange)
        with Call(self._connection(), exchange, messages, options) as call:
            for message in call:
                exchange.receive(message)
            return exchange.finish()

    def _run_shared(
        self, job: ArrayJob, attempts: Attempts, *, again: bool = True
    ) -> Receipt | None:
        """Compute a job in shared memory; None where there is none for it."""
        shared = self._sharing.place(job)
        rooms = self._allocate(shared.sizes)
        if rooms is None:
            return None
        shared.place(rooms)
        shared.copy_in()
        exchange = shared.exchange()
        options = attempts.options(job.plan.options)
        try:
            with Call(self._connection(), exchange, exchange.messages, options) as call:
                for message in call:
                    exchange.receive(message)
                receipt = exchange.finish()
        except BaseException as error:
            if not shared.worth_another_try(error) or not again:
                if shared.at_risk:
                    attempts.make_final()
                raise
        else:
            shared.copy_out()
            return receipt
        return self._run_shared(job, attempts, again=False)

    def _allocate(self, sizes: Sequence[int]) -> list[Allocation] | None:
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
                region = connection.open_region(size_bytes, self._metadata)
            except GradwireError as error:
                refusal = error
                if not may_be_smaller(error):
                    break
            else:
                return pool.add(region, sizes)
        if refusal is not None:
            self._sharing.on_refusal(refusal)
        return None

    def _compute(self, job: ArrayJob, options: Options) -> Receipt:
        exchange = job.unary_exchange()
        try:
            connection, request = self._connection(), exchange.request(job.operands)
            response = call_unary(
                connection.compute, request, options.timeout_s, options.metadata
            )
        except grpc.RpcError as error:
            raise call_error(error, self._endpoint, options.job_id) from None
        return exchange.receive(response)

    def _info(self, timeout_s: float | None) -> GetServerInfoResponse:
        info = self._connection().info
        return call_unary(info, GetServerInfoRequest(), timeout_s, self._metadata)

    def _connection(self) -> Connection:
        with self._lock, fork_support.calling():
            self._require_open()
            self._require_calls()
            if self._connected is None:
                self._connected = Connection(self._endpoint)
            return self._connected

    def _after_fork(self) -> None:
        # The parent's channels and regions are not this process's to use, nor
        # to close; and their locks may have been held by threads not here.
        _inherited.append((self._connected, self._sharing.after_fork()))
        self._connected = None
        self._memory = ResultPool()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        if self._closed:
            self._closing.set()
        self._retries.renew()
        if self._servers is not None:
            self._servers.renew()


_clients: weakref.WeakSet[Client] = weakref.WeakSet()
_inherited: list[tuple[Connection | None, Pool]] = []


def _channels() -> list[grpc.Channel]:
    connected = [client._connected for client in list(_clients)]
    return [each.channel for each in connected if each is not None]


# gRPC would cancel the parent's calls in the child, for which it takes locks
# that a thread of the parent may hold. It is kept from knowing the channels.


def _before_fork() -> None:
    for channel in _channels():
        cygrpc.fork_unregister_channel(channel)


def _after_fork_in_parent() -> None:
    for channel in _channels():
        cygrpc.fork_register_channel(channel)


def _after_fork_in_child() -> None:
    for client in list(_clients):
        client._after_fork()


fork_support.at_fork(_before_fork, _after_fork_in_parent, _after_fork_in_child)
