"""The class `AsyncClient`."""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable, Sequence
from typing import Any, Unpack

from gradwire._api.errors import StateUnknownError
from gradwire._api.options import (
    BackwardOptions,
    DtypeLike,
    ForwardOptions,
    GradientsOptions,
    check_names,
    parse_options,
    parse_timeout,
)
from gradwire._api.session_types import SavedState, SessionInfo, SessionSummary
from gradwire._api.types import Array, Backward, Gradients, ServerInfo
from gradwire._arrays.result_library import require_no_graph
from gradwire._client._async.batch import run
from gradwire._client._async.engine import AsyncEngine
from gradwire._client._async.session import AsyncSession
from gradwire._client._async.session_lease import AsyncSessionLeases
from gradwire._client._async.spread_stream import AsyncSpreadStream
from gradwire._client._async.stream import AsyncGradientStream
from gradwire._client.client_base import ClientBase
from gradwire._client.options import ClientOptions
from gradwire._client.session_base import (
    SessionOptions,
    check_id,
    check_state,
    saved_state_of,
    session_info_of,
    summary_of,
)
from gradwire._resilience.row_reader import RowReader
from gradwire._transport.shm.policy import EmptyArray
from gradwire_protocol.matrices import RESULTS, Matrix
from gradwire_protocol.v1 import session_service_pb2


class AsyncClient(ClientBase[AsyncEngine]):
    """A client for programs with an event loop.

    Making a client does no I/O. Entering it as a context manager asks the server
    about itself, as `connect` does; otherwise the first call makes the connection.
    A client belongs to the event loop of its first use. Coroutines may share it.

    Args:
        address: ``HOST:PORT``, ``unix:PATH``, or several addresses; see `connect`.
        **options: See `connect`.

    Raises:
        InputError: An argument is invalid, or a file of `tls` or the token cannot
            be used.

    Example:
        >>> async with gradwire.AsyncClient("gpu-node:50051") as client:
        ...     y, dx, dw = await client.gradients(x, w, dy)
    """

    def __init__(
        self, address: str | Sequence[str], **options: Unpack[ClientOptions]
    ) -> None:
        check_names("AsyncClient", options, ClientOptions)
        super().__init__(AsyncEngine(address, options))
        self._leases = AsyncSessionLeases()

    async def __aenter__(self) -> AsyncClient:
        """Shake hands with the server, unless that was done.

        Raises:
            ClientStateError: The client was closed.
            ConnectError: As for `connect`.
        """
        self._engine.require_open()
        if not self._greeted:
            try:
                await self.handshake()
            except BaseException:
                await self.close()
                raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the sessions and the connection, and cancel running calls.

        The server frees the sessions' memory; if it does not answer within 5 seconds,
        it does so when their leases end.
        """
        try:
            await self._leases.close()
        finally:
            await self._engine.aclose()

    async def handshake(self) -> ServerInfo:
        """Ask the server about itself, and refuse a server that cannot be used.

        Of several servers, at least one has to answer. A server that does not
        answer within a second after the first is left out for now.

        Returns:
            The server's answer; of several servers, the first.

        Raises:
            ConnectError: As for `connect`.
        """
        info = await self._engine.handshake()
        self._greeted = True
        return info

    async def server_info(
        self, *, timeout_s: float | None = None, address: str | None = None
    ) -> ServerInfo:
        """Ask the server about its version, devices, features and limits.

        Args:
            timeout_s: Seconds that the server has to answer.
            address: Which of several servers; None: the server of the next job.

        Raises:
            InputError: There is no server at that address.
            CallError: The server did not answer.

        Example:
            >>> (await client.server_info()).limits.max_jobs
            64
        """
        seconds = parse_timeout(timeout_s, "timeout_s") or self._engine.jobs.timeout_s
        return await self._engine.server_info(seconds, address)

    async def set_servers(self, addresses: Sequence[str]) -> None:
        """Use other servers from now on: those that came and went.

        Servers that are gone finish the jobs that they have. New jobs, and the next
        segments of jobs with ``spread=True``, go to the servers given here.

        Args:
            addresses: All addresses, ``HOST:PORT`` or ``unix:PATH``.

        Raises:
            InputError: An address is invalid; or the client was not created with a
                list of addresses, or with a DNS name for several.

        Example:
            >>> client = gradwire.AsyncClient(["node-1:50051"])
            >>> await client.set_servers(["node-1:50051", "node-2:50051"])
        """
        await self._engine.set_servers(addresses)

    async def empty(
        self, shape: int | Sequence[int], dtype: DtypeLike = "float32"
    ) -> Array:
        """Create an array in memory shared with the server, or else an ordinary array.

        The elements of an array in shared memory are not sent. As an operand or as
        `out` of `gradients`, `forward` and `backward`, the array is used in place,
        and so is every C-contiguous part of it that begins at a multiple of 64
        bytes; other operands are copied to shared memory first. The memory is
        reused once the last view of it is gone, and stays valid after the client is
        closed. Do not change an array while a job reads it.

        A job can fail without an answer of the server (after its deadline, a
        cancellation, or a broken connection). The server may then still write to
        the arrays of its `out` for as long as a row block takes. Such a job is not
        tried again, and the arrays are ordinary arrays from then on.

        Args:
            shape: The array's shape.
            dtype: A dtype that gradwire computes.

        Returns:
            An uninitialized array.

        Raises:
            InputError: The shape or the dtype is invalid.
            GradwireError: ``transport="shm"``, and the server has no more memory.

        Example:
            >>> x = await client.empty((4096, 1024))
            >>> x[:] = rows
            >>> y = await client.forward(x, w)
        """
        self._engine.require_open()
        wanted = EmptyArray(shape, dtype)
        if not self._engine.shm.on:
            return wanted.made(None)
        return wanted.made(await self._engine.allocate(wanted.sizes))

    def session(
        self, keep: int | str, **options: Unpack[SessionOptions]
    ) -> AsyncSession:
        """Create a session: tensors that stay on the server between calls.

        A training loop then sends activations only (docs/training.md).

        Args:
            keep: Bytes reserved for its tensors, as a number or a text such as
                ``"2GiB"``: weights, their optimizer states, gradients, and the X of
                each layer between `forward` and `backward`.
            **options:
                lease_s: Seconds after which the server closes the session, if this
                    program dies; None: the server's default. The lease is renewed by
                    itself.
                label: A name for people.
                restore: Name of a saved state of this caller's tenant, with which the
                    session begins: its named tensors are in `session.tensors`, and
                    `session.step_count` has its steps. Gradients are empty.
                save_every: Save the state on the server after every so many steps,
                    before `step` returns: a step whose number is a multiple of it is
                    not lost with the server.
                save_as: The name of that state: 1 to 64 letters, digits, ".", "_" or
                    "-". `save_every` and `save_as` go together.

        `restore` and `save_every` need a server with a directory for states
        (docs/failing.md).

        Returns:
            The session, to be opened as a context manager.

        Raises:
            InputError: An argument is invalid.

        Example:
            >>> async with client.session(keep="2GiB") as session:
            ...     w = await session.put(w0, name="fc1")
        """
        self._engine.require_open()
        check_names("session", options, SessionOptions)
        return AsyncSession(self._engine, self._remember, self._leases, keep, **options)

    async def sessions(self, *, address: str | None = None) -> list[SessionSummary]:
        """List the open sessions of this caller's tenant, the oldest first.

        Without authentication, all callers of a server are one tenant.

        Args:
            address: Which of several servers; None: the server of the next job.

        Raises:
            GradwireError: The call failed.
        """
        request = session_service_pb2.ListSessionsRequest()
        answer = await self._engine.call_once("ListSessions", request, address)
        return [summary_of(each) for each in answer.sessions]

    async def close_session(self, id: str, *, address: str | None = None) -> None:  # noqa: A002 - as in `sessions`
        """Close a session of this caller's tenant, for example of a dead client.

        Its client then gets `SessionLostError`.

        Args:
            id: Its id, from `sessions`.
            address: Which of several servers; None: the server of the next job.

        Raises:
            InputError: The id is empty.
            SessionLostError: There is no such session.
            GradwireError: The call failed.
        """
        request = session_service_pb2.CloseSessionRequest(id=check_id(id))
        await self._engine.call_once("CloseSession", request, address)

    async def describe_session(
        self,
        id: str,  # noqa: A002 - as in `sessions`
        *,
        address: str | None = None,
    ) -> SessionInfo:
        """Return the state and the tensors of a session of this caller's tenant.

        See `AsyncSession.describe`, for a program without the session. It does not
        renew the session's lease.

        Args:
            id: Its id, from `sessions`.
            address: Which of several servers; None: the server of the next job.

        Raises:
            InputError: The id is empty.
            SessionLostError: There is no such session.
            GradwireError: The call failed.
        """
        request = session_service_pb2.DescribeSessionRequest(id=check_id(id))
        answer = await self._engine.call_once("DescribeSession", request, address)
        return session_info_of(answer)

    async def save_session(
        self,
        id: str,  # noqa: A002 - as in `sessions`
        name: str,
        *,
        address: str | None = None,
    ) -> int:
        """Save a session of this caller's tenant on its server.

        See `AsyncSession.save_on_server`, for a program without the session.

        Args:
            id: Its id, from `sessions`.
            name: The name of the state.
            address: Which of several servers; None: the server of the next job.

        Returns:
            The steps of the saved state.

        Raises:
            InputError: The id is empty, or the name is invalid.
            SessionLostError: There is no such session.
            StateNotSavedError: The state could not be saved.
            GradwireError: The call failed.
        """
        request = session_service_pb2.SaveSessionRequest(
            id=check_id(id), name=check_state(name, "name")
        )
        answer = await self._engine.call_once("SaveSession", request, address)
        step: int = answer.step
        return step

    async def saved_states(self, *, address: str | None = None) -> list[SavedState]:
        """List the saved states of this caller's tenant, in the order of their names.

        Args:
            address: Which of several servers; None: the server of the next job.

        Raises:
            UnsupportedError: The server has no directory for states.
            GradwireError: The call failed.
        """
        request = session_service_pb2.ListSavedStatesRequest()
        answer = await self._engine.call_once("ListSavedStates", request, address)
        return [saved_state_of(each) for each in answer.states]

    async def delete_saved_state(
        self, name: str, *, address: str | None = None
    ) -> None:
        """Delete a saved state of this caller's tenant.

        Sessions that were restored from it, or save under its name, go on.

        Args:
            name: Its name, from `saved_states`.
            address: Which of several servers; None: the server of the next job.

        Raises:
            InputError: The name is invalid.
            StateUnknownError: There is no such state.
            UnsupportedError: The server has no directory for states.
            GradwireError: The call failed.
        """
        request = session_service_pb2.DeleteSavedStateRequest(
            name=check_state(name, "name")
        )
        try:
            await self._engine.call_once("DeleteSavedState", request, address)
        except StateUnknownError as error:
            if error.attempts == 1:
                raise
            # The attempt before has deleted it, and its answer was lost.

    async def gradients(
        self,
        x: Any,
        w: Any,
        dy: Any,
        *,
        out: Any = None,
        **options: Unpack[GradientsOptions],
    ) -> Gradients:
        """Compute Y = X W, dX = dY Wᵀ, dW = Xᵀ dY, or those that are wanted.

        db, if it is wanted, has the column sums of dY: the gradient of a bias.

        All operands have one dtype: float16, bfloat16, float32 or float64. Nested
        lists of Python floats are float64. NumPy's array-likes are accepted in any
        memory layout. CuPy arrays, CUDA tensors of PyTorch and other arrays that
        DLPack can copy to host memory are copied (see `Receipt.host_copy_bytes`).

        If a needed operand is a tensor of PyTorch, the results are tensors, on the
        device of the first operand on a GPU, else on the CPU. They do not require
        grad, whether the operands do or not. Otherwise, if a needed operand is a CuPy
        array, the results are CuPy arrays on its device. All other operands (of JAX,
        too) give NumPy arrays.

        Shapes are those of `numpy.matmul` and `torch.matmul`. A vector X is one row, a
        vector W one column, and Y loses that dimension. The batch dimensions of X
        (..., m, n) and W (..., n, k) are broadcast, and dX and dW are summed over the
        dimensions along which X or W was repeated. Where both have a batch dimension,
        each index of it is a job, and up to 8 jobs run at the same time; the receipt is
        of all of them (`Receipt.jobs`). If X alone is shared, all W are sent as one
        matrix, which the server has to hold.

        Args:
            x: X, shape (..., n) or (n,); with a W of two dimensions, the leading
                dimensions count as rows. None if no wanted result needs it; the same
                holds for `w` and `dy`. Without X, dX has dY's leading dimensions.
            w: W, shape (n, k), (n,) or (..., n, k). Without W, dW has shape (n, k).
            dy: dY = dL/dY, of Y's shape: (..., k) with X's leading dimensions, if W
                has two.
            out: Arrays for the results: a mapping such as ``{"dw": array}``, or a
                tuple (y, dx, dw) with None for arrays to be made. NumPy or CuPy
                arrays or PyTorch tensors, on any device, of the results' shapes
                and dtypes. Their contents are undefined after a failure.
            **options: All of them are optional.

        Keyword Args:
            results: Any of ``"y"``, ``"dx"``, ``"dw"`` and ``"db"``; the first
                three by default.
            result_dtype: The results' dtype: one for all, or a mapping such as
                ``{"dw": "float32"}``. By default, the operands' dtype.
            wire_dtype: ``"bfloat16"`` or ``"float16"``: float32 operands are
                rounded to it and sent in half the bytes, and so are the results that
                `result_dtype` does not name; docs/gradients.md states the
                loss. A result that is too large becomes Inf. A finite operand
                that is too large raises InputError and cancels the job.
            dw_accumulator: ``"float32"`` or ``"float64"``: the dtype in which dW
                and db are summed over row blocks. By default ``"float64"`` for
                float32 and float64 operands, ``"float32"`` for 16-bit operands.
            allow_tf32: Whether float32 products may use TF32; False by default.
            checksum: Whether a CRC-32C protects every payload; False by default.
            verify: Whether the client checks the results, with random sums that
                cost O(m n + n k + m k): True, a number of rounds, or a `Verify`; None:
                the client's `verify`. docs/gradients.md states the errors found.
            timeout_s: Seconds for the whole call, retries included.
            on_progress: Called with a `Progress` now and then, never concurrently,
                maybe in another thread. An exception that it raises cancels the
                job and is raised here.
            request_id: The job's id in the server's log, in the receipt and in
                errors: 1 to 128 printable ASCII characters.
            metadata: Metadata of the gRPC call: ``{"traceparent": "00-..."}``.
            checkpoint_rows: The least number of rows between two checkpoints, from
                which a job continues after a failure (docs/failing.md). Each has
                dW's elements in `dw_accumulator`. 0: only when the server stops.
                None: the client decides.
            block_rows: Most rows of a row block, a power of two. The server's own
                blocks (see `Receipt.block_rows`) suit a fast link; smaller blocks let
                results leave while operands are still being sent. ``"auto"``: about
                an eighth of the rows, but at least 64 rows, and 256 KiB of the wider
                of X and dY; for a link that is slower than the products. 0: the
                server's own.
                None: the client's `block_rows`. It affects the last bits of results
                (docs/gradients.md), and needs a server with the feature
                "block-rows".
            spread: Whether all servers of the client, and all of their devices,
                compute the job together (docs/spread.md): the rows are cut into
                segments, and each goes to a server that is idle, or fails over to
                another one. False by default. The last bits depend neither on the
                number of servers nor on their order; they may differ from those of
                a job that is not spread. Not for W with batch dimensions or vectors.

        Returns:
            The tuple (y, dx, dw) of arrays or tensors, or the arrays of `out`; None
            for results that are not wanted. Y has the shape of ``matmul(x, w)``: (...,
            k) for a W of two dimensions. dX and dW have the shapes of X and W. `db` has
            shape (k,), or () for a vector W, and is summed over all other dimensions.
            `receipt` says how the job was computed.

        Raises:
            InputError: An argument is invalid; nothing was sent.
            VerificationError: `verify` found a wrong result.
            GradwireError: The job failed; each subclass is one kind of failure.

        Example:
            >>> y, dx, dw = await client.gradients(x, w, dy)
            >>> (await client.gradients(x, None, dy, results="dw")).dw.shape
            (784, 10)
            >>> heads, weights = np.ones((8, 50, 64)), np.ones((8, 64, 32))
            >>> (await client.forward(heads, weights)).shape
            (8, 50, 32)
        """
        check_names("gradients", options, GradientsOptions)
        given = {Matrix.X: x, Matrix.W: w, Matrix.DY: dy}
        job = self._engine.jobs.array_job(given, out, RESULTS, parse_options(**options))
        receipt = self._remember(await run(self._engine, job))
        y, dx, dw, db = job.outputs.results(RESULTS)
        return Gradients(y, dx, dw, receipt, db)

    async def forward(
        self, x: Any, w: Any, *, out: Any = None, **options: Unpack[ForwardOptions]
    ) -> Any:
        """Compute Y = X W.

        Args:
            x: X, shape (..., n), as for `gradients`.
            w: W, shape (n, k), (n,) or (..., n, k).
            out: An array for Y, as for `gradients`.
            **options: As for `gradients`, except `results`, `dw_accumulator` and
                `checkpoint_rows`.

        Returns:
            Y, of the shape of ``matmul(x, w)``; or `out`, if it was given.

        Raises:
            InputError: An argument is invalid; nothing was sent. So is a tensor that
                requires grad, while PyTorch's grad mode is on: Y has no autograd graph.
            GradwireError: The job failed; each subclass is one kind of failure.

        Example:
            >>> (await client.forward(x, w)).shape
            (60000, 10)
        """
        check_names("forward", options, ForwardOptions)
        require_no_graph((("x", x), ("w", w)))
        given, returns = {Matrix.X: x, Matrix.W: w}, (Matrix.Y,)
        parsed = parse_options(results="y", **options)
        job = self._engine.jobs.array_job(given, out, returns, parsed)
        self._remember(await run(self._engine, job))
        return job.outputs.results(returns)[0]

    async def backward(
        self,
        x: Any,
        w: Any,
        dy: Any,
        *,
        out: Any = None,
        **options: Unpack[BackwardOptions],
    ) -> Backward:
        """Compute the gradients dX = dY Wᵀ and dW = Xᵀ dY.

        Args:
            x: X, shape (..., n), as for `gradients`.
            w: W, shape (n, k), (n,) or (..., n, k).
            dy: dY = dL/dY, of Y's shape.
            out: Arrays for the results, as for `gradients`; a tuple is (dx, dw).
            **options: As for `gradients`, except `results`.

        Returns:
            The tuple (dx, dw), of the shapes of X and W.

        Raises:
            InputError: An argument is invalid; nothing was sent.
            GradwireError: The job failed; each subclass is one kind of failure.

        Example:
            >>> dx, dw = await client.backward(x, w, dy)
        """
        check_names("backward", options, BackwardOptions)
        given = {Matrix.X: x, Matrix.W: w, Matrix.DY: dy}
        returns = (Matrix.DX, Matrix.DW)
        parsed = parse_options(results=("dx", "dw"), **options)
        job = self._engine.jobs.array_job(given, out, returns, parsed)
        receipt = self._remember(await run(self._engine, job))
        dx, dw = job.outputs.results(returns)
        return Backward(dx, dw, receipt)

    def stream(
        self,
        rows: Iterable[Any] | AsyncIterable[Any],
        w: Any = None,
        *,
        m: int | None = None,
        **options: Unpack[GradientsOptions],
    ) -> AsyncGradientStream:
        """Compute the gradients of rows that arrive in parts.

        Client and server hold a few blocks of rows, however many rows there are.

        Args:
            rows: An iterable, or an asynchronous iterable, of pairs (x_rows,
                dy_rows) of shapes (r, n) and (r, k); r may differ from item to
                item. An operand that no wanted result needs is None; if one
                operand is needed alone, an item may be that operand. Items are
                requested on the event loop, ahead of the results: an iterable
                that takes long should be asynchronous. The memory of an item may
                be reused once the next item is requested. The items of a sequence
                are read again if the job continues after a failure; rows of other
                iterables are copied for that (docs/failing.md). An exception of
                the iterable cancels the job and is raised here.
            w: W, shape (n, k), without batch dimensions; None if only dW and db are
                wanted.
            m: The number of all rows, if it is known. Without it, a `block_rows` of
                ``"auto"`` is the server's own.
            **options: As for `gradients`. `verify` checks a block before it is
                handed out, and dW at the end. `timeout_s` is for the whole stream.
                With `spread`, rows are copied into segments. Up to
                `RetryPolicy.held_bytes` of operands and results are in memory; in any
                case a segment for each device, and one more.

        Returns:
            An asynchronous iterator of `RowBlock`, with `dw`, `db` and `receipt` once
            it is exhausted. W and the first item decide the library and the device of
            the results, as for `gradients`. Iterating begins the job. A stream that is
            left early, by ``break``, an exception or garbage collection, cancels its
            job; as a context manager it does so at once.

        Raises:
            InputError: An argument is invalid. An invalid item raises while
                iterating.
            RowsLostError: While iterating: the job failed, and rows that are
                needed again are no longer held.

        Example:
            >>> async with client.stream(pairs(), w) as stream:
            ...     async for block in stream:
            ...         save(block.first_row, block.y, block.dx)
            >>> stream.dw.shape
            (784, 10)
        """
        check_names("stream", options, GradientsOptions)
        parsed = parse_options(**options)
        self._engine.require_open()
        reader = RowReader(w, m, self._engine.jobs.with_defaults(parsed))
        kind = AsyncSpreadStream if parsed.spread else AsyncGradientStream
        return kind(self._engine, rows, reader, self._remember)
