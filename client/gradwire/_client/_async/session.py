"""The class `AsyncSession`."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from os import PathLike
from types import MappingProxyType
from typing import Any, TypeVar, Unpack

from gradwire._api.errors import CallError, GradwireError, InputError
from gradwire._api.optimizers import Optimizer
from gradwire._api.options import (
    DtypeLike,
    SessionGradientsOptions,
    SessionJobOptions,
    check_names,
    parse_dtype,
    parse_options,
)
from gradwire._api.session_types import Forward, SessionInfo, StepResult, TensorInfo
from gradwire._api.types import Array, Gradients, Receipt
from gradwire._arrays.result_library import require_no_graph
from gradwire._client import session_files
from gradwire._client._async.engine import AsyncEngine
from gradwire._client._async.session_lease import (
    INTERRUPTED_S,
    AsyncSessionLease,
    AsyncSessionLeases,
    undo_open,
    was_interrupted,
)
from gradwire._client.session_base import (
    SHARED_FROM_BYTES,
    Context,
    SessionBase,
    SessionOptions,
    callers_names,
    check_columns,
    check_name,
    check_same_step,
    check_state,
    check_to_save,
    check_updates,
    elements_bytes,
    gradient_name,
    half_restored,
    is_lost,
    is_refusal,
    plan_restore,
    put_operand,
    result_dtypes,
    session_info_of,
    swapped_names,
)
from gradwire._client.session_files import SavedTensor
from gradwire._client.step_tensors import callers_tensors
from gradwire._core import interrupts
from gradwire._core.kept import Tensor
from gradwire._core.put_exchange import sha256_of
from gradwire._resilience.array_job import ArrayJob
from gradwire._resilience.load_balancer import Stay
from gradwire._resilience.retry import Attempts
from gradwire._transport.async_io import run_beside
from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.job_spec import KeptResult
from gradwire_protocol.matrices import DEFAULT_RESULTS, RESULTS, Matrix, operands_for
from gradwire_protocol.v1 import session_service_pb2 as pb2

R = TypeVar("R")


class AsyncSession(SessionBase):
    """Tensors that stay on a server: weights, activations, gradients.

    Create it with `AsyncClient.session`, and use it as a context manager. It belongs to
    one server, and to one process: the child of a fork cannot use it. Its lease is
    renewed in the background while the program runs. Threads may share it. It ends with
    its client, if it is not closed before.

    Example:
        >>> async with client.session(keep="2GiB") as session:
        ...     w = await session.put(w0, name="fc1")
        ...     g = await session.zeros_like(w)
        ...     y, context = await session.forward(x, w)
        ...     dx = await session.backward(context, dy, into=g)
        ...     await session.step(gradwire.AdamW(lr=3e-4), {w: g}, max_norm=1.0)
    """

    def __init__(
        self,
        engine: AsyncEngine,
        remember: Callable[[Receipt], Receipt],
        leases: AsyncSessionLeases,
        keep: int | str,
        **options: Unpack[SessionOptions],
    ) -> None:
        super().__init__(keep, **options)
        self._client_engine = engine
        self._engine = engine
        self._remember = remember
        self._leases = leases
        self._lease: AsyncSessionLease | None = None

    async def __aenter__(self) -> AsyncSession:
        if not self.token or self._ended:
            await self.open()
        return self

    async def __aexit__(
        self, _: object, error: BaseException | None, __: object
    ) -> None:
        # Ctrl-C does not wait for long for a server that does not answer.
        await self.close(timeout_s=INTERRUPTED_S if was_interrupted(error) else None)

    async def open(self) -> None:
        """Open the session and reserve its memory.

        Raises:
            ClientStateError: The session was opened before, or the client was closed.
            StateUnknownError: There is no saved state of the name in `restore`.
            GradwireError: The server refused, or has no sessions.
        """
        self.require_new()
        request = self.open_request()
        attempts = self._attempts("OpenSession", self._timeout_s)

        async def attempt() -> None:
            server = await self._client_engine.lease(attempts)
            with server as lease, self._leases.opening():
                await self._open_on(lease.engine, lease.stay, request, attempts)

        await self._client_engine.retry(attempts, attempt)
        if self.restored:
            try:
                self.take_tensors(await self.describe())
            except BaseException:
                await self.close()
                raise

    async def _open_on(
        self,
        engine: AsyncEngine,
        stay: Callable[[], Stay],
        request: pb2.OpenSessionRequest,
        attempts: Attempts,
    ) -> None:
        """Open the session on a server, and keep its lease."""
        try:
            answer = await engine.session_call(
                "OpenSession", request, attempts.left_s, attempts
            )
            with interrupts.held():
                self._engine = engine
                self.opened(answer)
                self._lease = AsyncSessionLease(
                    self,
                    engine,
                    stay(),
                    token=self.token,
                    id=self._id,
                    affinity=self.affinity,
                    lease_s=self.lease_s,
                )
                self._leases.add(self._lease)
        except BaseException as error:
            # With a lease, the session is closed once it is dropped.
            if was_interrupted(error) and self._lease is None:
                await undo_open(engine, request, self.affinity)
            raise

    async def close(self, *, timeout_s: float | None = None) -> None:
        """Close the session and free its memory.

        Closing it again does nothing, nor does closing it in the child of a fork.
        Closing the client closes its sessions. After Ctrl-C or a cancellation, it tries
        for a second more.

        Args:
            timeout_s: Seconds for the server to answer, after which the lease ends the
                session; None: 10.
        """
        if self._lease is not None:
            await self._lease.close(timeout_s=timeout_s)

    async def put(
        self,
        array: Any,
        *,
        name: str = "",
        compute_dtype: DtypeLike = None,
        replace: Tensor | None = None,
        keep_states: bool = False,
        frozen: bool = False,
    ) -> Tensor:
        """Keep an array as a weight.

        A frozen weight is sent once, however many sessions of the caller's tenant put
        the same elements: from 1 MiB on, the server is asked first whether it has them
        on the session's device. In host memory, the sessions then share the elements.

        Args:
            array: Elements of any shape, as the operands of `AsyncClient.gradients`.
            name: A name for files and descriptions; empty: that of `replace`.
            compute_dtype: "bfloat16" or "float16": keep a copy of float32 elements,
                rounded to it, for jobs with operands of that dtype. Steps update the
                float32 elements and round the copy anew.
            replace: The weight to replace, in one piece. Its handles stay valid if
                shape and dtypes are the same.
            keep_states: Whether the optimizer states of `replace` go on with the new
                elements, as those of a PyTorch parameter whose elements are copied
                over do. Otherwise they are forgotten, as for a new parameter.
            frozen: Whether the weight never changes: steps refuse it. Put it again,
                with `replace`, to train it.

        Returns:
            A handle of the kept tensor.

        Raises:
            InputError: An argument is invalid.
            SessionFullError: The session's `keep` is too small.
            GradwireError: The call failed.
        """
        await self._settle()
        elements, shape = put_operand(array, "array")
        replaced = None if replace is None else self.own(replace, "replace")
        if keep_states and replaced is None:
            raise InputError("keep_states is True, but replace is not given")
        if keep_states and frozen:
            raise InputError(
                "keep_states and frozen are True: a frozen weight has none"
            )
        tensor, header = self.new_tensor(
            shape,
            elements.dtype,
            pb2.TENSOR_ROLE_WEIGHT,
            name=name or (replaced.name if replaced else ""),
            compute_dtype=compute_dtype,
            number=replaced.number if replaced else None,
            keep_states=keep_states,
            frozen=bool(frozen),
        )
        await self._put_weight(header, elements)
        return tensor

    async def zeros_like(
        self, weight: Tensor, *, name: str = "", dtype: DtypeLike = None
    ) -> Tensor:
        """Keep a gradient of a weight's shape, at first 0.

        Args:
            weight: The weight.
            name: A name for descriptions, and to find it again in a restored session;
                empty: the weight's name with ".grad", if it has one.
            dtype: Its dtype; None: the weight's.

        Returns:
            A handle of the gradient; of a transposed weight, a transposed one.
        """
        await self._settle()
        like = self.own(weight, "weight")
        kind = Dtype.named(like.dtype)
        if dtype is not None:
            kind = parse_dtype(dtype, "dtype")
        name = gradient_name(name, like.name)
        gradient, header = self.new_tensor(
            like.kept_shape, kind, pb2.TENSOR_ROLE_GRADIENT, name=name, zeros=True
        )
        await self._put(header, None)
        return gradient.T if like.transposed else gradient

    async def clear(self, gradient: Tensor) -> None:
        """Forget a gradient's contributions."""
        await self._settle()
        own = self.own(gradient, "gradient")
        _, header = self.new_tensor(
            own.kept_shape,
            Dtype.named(own.dtype),
            pb2.TENSOR_ROLE_GRADIENT,
            name=own.name,
            zeros=True,
            number=own.number,
        )
        await self._put(header, None)
        self.forget_parts(own.number)

    async def get(self, tensor: Tensor, *, state: str = "") -> Array:
        """Return the elements of a tensor, or of one of its optimizer states.

        Args:
            tensor: The tensor.
            state: "exp_avg", "exp_avg_sq" or "momentum_buffer"; empty: the tensor.

        Returns:
            An array of the tensor's shape.
        """
        await self._settle()
        own = self.own(tensor, "tensor")
        elements = await self._elements(own, check_name(state, "state"))
        return elements.T if own.transposed else elements

    async def put_state(
        self, weight: Tensor, state: str, array: Any, *, updates: int
    ) -> None:
        """Put an optimizer state of a weight, for example of a run elsewhere.

        Args:
            weight: The weight.
            state: "exp_avg", "exp_avg_sq" or "momentum_buffer", as in PyTorch.
            array: Its elements, of the weight's shape and dtype.
            updates: The weight's updates so far, at least 1: "step" of a PyTorch state
                of Adam. It counts for the weight, so each of its states has the same.

        Raises:
            InputError: An argument is invalid.
            RequestError: There is no such state, or the array has another shape or
                dtype.
            SessionFullError: The session's `keep` is too small.
            GradwireError: The call failed.
        """
        await self._settle()
        own = self.own(weight, "weight")
        check_updates(updates)
        if own.transposed:
            raise InputError("weight is transposed: pass weight.T, and the array so")
        await self._put_state(own, check_name(state, "state"), array, updates)

    async def save(self, path: str | PathLike[str]) -> None:
        """Save the weights and their optimizer states to a safetensors file.

        Every weight needs a name of its own. The file is written in one piece: after a
        failure, an earlier file is unchanged.

        Args:
            path: The file.

        Raises:
            InputError: A weight has no name, or the package safetensors is missing.
            StepConflictError: A step was made meanwhile.
            OSError: The file cannot be written.
        """
        await self._settle()
        info = await self.describe()
        saved: dict[str, SavedTensor] = {}
        for tensor in info.tensors:
            if tensor.role == "weight":
                check_to_save(tensor, saved)
                saved[tensor.name] = SavedTensor(
                    await self._elements(tensor),
                    tensor.compute_dtype,
                    tensor.updates,
                    {
                        state: await self._elements(tensor, state)
                        for state in tensor.states
                    },
                    tensor.frozen,
                )
        check_same_step(info, await self.describe())
        await run_beside(lambda: session_files.write(path, saved))

    async def restore(self, path: str | PathLike[str]) -> dict[str, Tensor]:
        """Put the weights and optimizer states of a file that `save` has written.

        A weight of the session with the same name is replaced; its handles stay valid.
        If restoring fails, the session is as before. If some weights were replaced by
        then, it is closed instead, so that no step mixes old and new ones.

        Args:
            path: The file.

        Returns:
            The weights, by name.

        Raises:
            InputError: The file is not one of a session, or the package safetensors
                is missing.
            SessionFullError: The session's `keep` is too small.
            SessionLostError: Restoring failed when some weights were replaced, or was
                interrupted: the session is closed.
            OSError: The file cannot be read.
        """
        saved = await run_beside(lambda: session_files.read(path))
        await self._settle()
        plan = plan_restore(await self.describe(), saved)
        restored: dict[str, Tensor] = {}
        try:
            for name, (tensor, earlier) in plan.items():
                elements, shape = put_operand(tensor.elements, name)
                handle, header = self.new_tensor(
                    shape,
                    elements.dtype,
                    pb2.TENSOR_ROLE_WEIGHT,
                    name=name,
                    compute_dtype=tensor.compute_dtype,
                    number=earlier.number if earlier else None,
                    frozen=tensor.frozen,
                )
                restored[name] = handle
                await self._put_weight(header, elements)
                for state, values in tensor.states.items():
                    await self._put_state(handle, state, values, tensor.updates)
        except BaseException as error:
            if any(plan[name][1] for name in restored):
                await self.close()
                if isinstance(error, Exception):
                    raise half_restored(error) from error
            else:
                with contextlib.suppress(GradwireError):
                    await self.drop(*restored.values())
            raise
        return {name: restored[name] for name in saved}

    async def save_on_server(self, name: str) -> int:
        """Save the session's state on the server, after the last step.

        `client.session(..., restore=name)` continues with it, also after the server was
        restarted: with the weights, their optimizer states and the step. Contributions
        to gradients since the last step, and what `forward` has kept, are not saved.
        An earlier state of that name is replaced in one piece, or stays.

        Args:
            name: A name among the states of this caller's tenant: 1 to 64 letters,
                digits, ".", "_" or "-".

        Returns:
            The steps of the saved state.

        Raises:
            InputError: The name is invalid.
            StateNotSavedError: The state could not be saved.
            UnsupportedError: The server has no directory for states.
            GradwireError: The call failed.
        """
        await self._settle()
        request = pb2.SaveSessionRequest(
            session=self.token, name=check_state(name, "name")
        )
        step: int = (await self._call("SaveSession", request)).step
        return step

    async def drop(self, *tensors: Tensor | Context) -> None:
        """Drop tensors, or what contexts keep, and free their memory."""
        await self._settle()
        numbers = [
            self.own(each.x if isinstance(each, Context) else each, "tensor").number
            for each in tensors
        ]
        request = pb2.DropTensorsRequest(session=self.token, tensors=numbers)
        await self._call("DropTensors", request)

    async def describe(self) -> SessionInfo:
        """Return the session's state and its tensors."""
        self.require_open()
        request = pb2.DescribeSessionRequest(session=self.token)
        return session_info_of(await self._call("DescribeSession", request))

    async def forward(
        self,
        x: Any,
        w: Tensor,
        *,
        keep: bool = True,
        out: Any = None,
        **options: Unpack[SessionJobOptions],
    ) -> Forward:
        """Compute Y = X W, and keep X for `backward`.

        Args:
            x: X, shape (..., n): an array, or a kept tensor. Do not change the array
                before `backward`, which sends it again if the session has lost it.
            w: W, shape (n, k). For a weight of shape (k, n), as PyTorch's, pass
                ``weight.T``: nothing is transposed.
            keep: Whether X is kept in the session, until `backward` has used it, or
                the second step after it.
            out: An array for Y.
            **options: `wire_dtype`, `result_dtype`, `dw_accumulator`, `allow_tf32`,
                `checksum`, `timeout_s`, `on_progress`, `request_id`, `metadata` and
                `block_rows`, as for `AsyncClient.gradients`.

        Returns:
            The tuple (y, context), Y of shape (..., k).

        Raises:
            InputError: An argument is invalid; nothing was sent. So is a tensor that
                requires grad, while PyTorch's grad mode is on: Y has no autograd graph.
            GradwireError: The job failed.
        """
        check_names("forward", options, SessionJobOptions)
        require_no_graph((("x", x),))
        await self._settle()
        own = self.own(w, "w")
        # With W transposed, the product is that of dX = dY W^T.
        rows, result = Matrix.X, Matrix.Y
        if own.transposed:
            rows, result = Matrix.DY, Matrix.DX
            check_columns(x, "x", own.shape, own.shape[0])
        given = {rows: x, Matrix.W: own.T if own.transposed else own}
        kept_x = isinstance(x, Tensor)
        number = self.new_number() if keep and not kept_x else None
        with callers_names(swapped=own.transposed):
            job = self._job(
                *(given, _named(out, result), (result,), options),
                swapped=own.transposed,
                keep={rows: number} if number else None,
            )
            await self._run(job)
        (y,) = job.outputs.results((result,))
        if not keep:
            return Forward(y, None)
        sent = job.operands.get(rows)
        handle = x
        if sent is not None and number is not None:
            shape = (sent.rows, sent.columns)
            handle = Tensor(self, number, shape, sent.dtype, "activation")
        lead = x.shape[:-1] if sent is None else sent.lead
        wire = options.get("wire_dtype")
        # A tensor of the caller's may be the X of others, too.
        return Forward(
            y,
            Context(handle, own, lead, None if kept_x else x, wire, uses_up=not kept_x),
        )

    async def backward(
        self,
        context: Context,
        dy: Any,
        *,
        into: Tensor | None = None,
        bias_into: Tensor | None = None,
        dx: bool = True,
        out: Any = None,
        **options: Unpack[SessionJobOptions],
    ) -> Any:
        """Compute dX = dY Wᵀ, and add dW = Xᵀ dY to a gradient in the session.

        Each context contributes once to a gradient, however often the call is repeated
        after a failure.

        Args:
            context: The context of `forward`.
            dy: dY = dL/dY, shape (..., k).
            into: The gradient of W; None: dW is not computed. dW has its dtype, unless
                `result_dtype` says otherwise.
            bias_into: The gradient of a bias, shape (k,): the column sums of dY. Not
                with a transposed W.
            dx: Whether dX is wanted.
            out: An array for dX.
            **options: As for `forward`.

        Returns:
            dX, shape (..., n); None if it is not wanted.

        Raises:
            InputError: An argument is invalid; nothing was sent.
            GradwireError: The job failed.
        """
        check_names("backward", options, SessionJobOptions)
        await self._settle()
        if not isinstance(context, Context):
            raise InputError(
                f"context is a {type(context).__qualname__}: expected the context that"
                " forward returned (it is None after forward(keep=False))"
            )
        w = context.w
        if context.wire_dtype is not None:
            options.setdefault("wire_dtype", context.wire_dtype)
        # See forward: with W transposed, X and dY change places.
        rows, other, result = Matrix.DY, Matrix.X, Matrix.DX
        if w.transposed:
            rows, other, result = Matrix.X, Matrix.DY, Matrix.Y
            check_columns(dy, "dy", w.shape, w.shape[1])
            if bias_into is not None:
                raise InputError(
                    "bias_into is given, but W is transposed: add up dy's rows instead"
                )
        given: dict[Matrix, Any] = {rows: dy}
        gradients = self.gradients_of(into, bias_into, transposed=w.transposed)
        results = [*((result,) if dx else ()), *gradients]
        if dx:
            given[Matrix.W] = w.T if w.transposed else w
        if Matrix.DW in gradients:
            given[other] = context.x
        if not results:
            raise InputError("dx is False and into is None: nothing is to be computed")

        async def run(x: Any) -> Any:
            operands = {**given, other: x} if other in given else given
            kept = isinstance(x, Tensor)
            job = self._job(
                *(operands, _named(out, result), results, options),
                swapped=w.transposed,
                gradients=gradients,
                context=context,
                last_use=other if context.uses_up and kept and other in given else None,
                leads={other: context.lead} if kept else None,
            )
            await self._run(job)
            return job.outputs.results((result,))[0] if dx else None

        with callers_names(swapped=w.transposed):
            try:
                return await run(context.x)
            except CallError as error:
                if context.local_x is None or not is_lost(error, context.x):
                    raise
                return await run(context.local_x)

    async def gradients(
        self,
        x: Any,
        w: Any,
        dy: Any,
        *,
        into: Tensor | None = None,
        bias_into: Tensor | None = None,
        out: Mapping[str, Any] | None = None,
        **options: Unpack[SessionGradientsOptions],
    ) -> Gradients:
        """Compute Y = X W, dX = dY Wᵀ and dW = Xᵀ dY in one job, or some of them.

        Each operand is an array or a kept tensor. Nothing is kept of arrays. Each call
        contributes to a gradient once, also when it is retried. After one that failed
        for good, `clear` the gradient: a step would wait for its contribution.

        Args:
            x: X, shape (..., n). None if no wanted result needs it; the same holds for
                `w` and `dy`.
            w: W, shape (n, k); or ``weight.T`` of a kept weight of shape (k, n).
            dy: dY = dL/dY, shape (..., k).
            into: The gradient of W, to which dW is added; it is not returned then.
            bias_into: The gradient of a bias, shape (k,): the column sums of dY. Not
                with a transposed W.
            out: Arrays for results, by name: ``{"dx": array}``.
            **options: As for `forward`, and `results`: any of ``"y"``, ``"dx"``,
                ``"dw"`` and ``"db"``; the first three by default. What `into` and
                `bias_into` name is computed in any case.

        Returns:
            The tuple (y, dx, dw), as of `Client.gradients`: None for what is not
            wanted, and for what stays in the session.

        Raises:
            InputError: An argument is invalid; nothing was sent.
            GradwireError: The job failed.

        Example:
            >>> y, dx, _ = await session.gradients(x, w, dy, into=g)
        """
        check_names("gradients", options, SessionGradientsOptions)
        await self._settle()
        wanted = set(parse_options(results=options.pop("results", _DEFAULT)).results)
        if out is not None and not isinstance(out, Mapping):
            raise InputError(
                f"out is a {type(out).__qualname__}: expected a mapping such as"
                ' {"dx": array}'
            )
        swapped = isinstance(w, Tensor) and self.own(w, "w").transposed
        gradients = self.gradients_of(into, bias_into, transposed=swapped)
        wanted.update(gradients)
        given = {Matrix.X: x, Matrix.W: w, Matrix.DY: dy}
        if swapped:
            # See forward: X and dY change places, and so do Y and dX.
            if Matrix.DB in wanted:
                raise InputError(
                    "db is wanted, but W is transposed: add up dy's rows instead"
                )
            for name, value, columns in (("x", x, 0), ("dy", dy, 1)):
                if value is not None:
                    check_columns(value, name, w.shape, w.shape[columns])
            given = {Matrix.X: dy, Matrix.W: w.T, Matrix.DY: x}
            other = {Matrix.Y: Matrix.DX, Matrix.DX: Matrix.Y}
            wanted = {other.get(each, each) for each in wanted}
            out = None if out is None else swapped_names(out)
            if out and out.get("dw") is not None:
                out = {**out, "dw": out["dw"].T}
        results = [each for each in RESULTS if each in wanted]
        with callers_names(swapped=swapped):
            operands = {each: given[each] for each in operands_for(results)}
            kept = [each for each in operands.values() if isinstance(each, Tensor)]
            if not (kept or gradients):
                raise InputError(
                    "no operand and no result is kept in the session: use the client's"
                    " gradients"
                )
            job = self._job(
                *(operands, out, results, options), swapped=swapped, gradients=gradients
            )
            receipt = await self._run(job)
        y, dx, dw, db = job.outputs.results(RESULTS)
        if swapped:
            y, dx, dw = dx, y, None if dw is None else dw.T
        return Gradients(y, dx, dw, receipt, db)

    async def step(
        self,
        optimizer: Optimizer,
        gradients: Mapping[Tensor, Tensor],
        *more: tuple[Optimizer, Mapping[Tensor, Tensor]],
        max_norm: float = 0.0,
        local_sum_of_squares: float = 0.0,
        inverse_scale: float = 1.0,
        skip_nonfinite: bool = False,
        keep_gradients: bool = False,
    ) -> StepResult:
        """Update weights from their gradients, all of them or none.

        A step that was interrupted, or whose answer was lost, may have been made. It
        can be repeated with the same arguments; otherwise the next call that uses
        tensors of the session completes it. In both cases it is made once. Gradients
        that it does not name keep their contributions.

        Args:
            optimizer: `SGD`, `Adam` or `AdamW`.
            gradients: The gradient of each weight.
            *more: Further pairs of optimizer and gradients.
            max_norm: Largest norm of all gradients together, to which they are scaled
                down; 0: no limit.
            local_sum_of_squares: The sum of squares of gradients that the caller
                holds, which count for the norm.
            inverse_scale: Factor of the gradients, for loss scaling.
            skip_nonfinite: Whether to skip the step if a gradient has NaN or Inf.
            keep_gradients: Whether the gradients keep their contributions.

        Returns:
            The outcome, with the norm before clipping.

        Raises:
            InputError: An argument is invalid; nothing was sent.
            StepConflictError: The session has made another step meanwhile, or a
                gradient lacks a contribution.
            StateNotSavedError: The step was made, but not saved (`save_every`). The
                same call again saves it.
            GradwireError: The call failed.
        """
        self.require_open()
        groups = [(optimizer, gradients), *more]
        options = {
            "max_norm": max_norm,
            "local_sum_of_squares": local_sum_of_squares,
            "inverse_scale": inverse_scale,
            "skip_nonfinite": skip_nonfinite,
            "keep_gradients": keep_gradients,
        }
        request = self.step_request(groups, **options)
        if not self.repeats_unsettled(request):
            await self._settle()
            request = self.step_request(groups, **options)
        with callers_tensors(groups):
            return await self._make_step(request)

    async def _settle(self) -> None:
        """Complete a step whose outcome is not known, if there is one.

        Raises:
            ClientStateError: The session is not open.
            GradwireError: The server did not answer.
        """
        self.require_open()
        if (request := self.unsettled_step()) is not None:
            try:
                await self._make_step(request)
            except CallError as error:
                if not is_refusal(error):
                    raise
                # It was not made, and never will be.

    async def _make_step(self, request: pb2.StepRequest) -> StepResult:
        try:
            return self.step_made(await self._call("Step", request))
        except BaseException as error:
            self.step_failed(request, error)
            raise

    async def _call(self, name: str, request: Any) -> Any:
        """Call a method of the session, with retries."""

        async def attempt(attempts: Attempts) -> Any:
            left_s = attempts.left_s
            return await self._engine.session_call(name, request, left_s, attempts)

        return await self._retried(name, attempt)

    async def _put_weight(self, header: Any, elements: Any) -> None:
        if header.frozen and elements.size_bytes >= SHARED_FROM_BYTES:
            header.sha256 = await run_beside(lambda: sha256_of(elements))
        await self._put(header, elements)

    async def _put(self, header: Any, elements: Any) -> None:
        # Another session may have put it.
        may_be_there = bool(header.sha256)

        async def attempt(attempts: Attempts) -> None:
            nonlocal may_be_there
            # The answer alone may have been lost. Without elements, that is found out
            # at once.
            if may_be_there and await self._is_there(header, attempts):
                return
            may_be_there = elements is not None
            await self._engine.put_tensor(
                header, elements, attempts, self.server_instance
            )

        await self._retried("PutTensor", attempt)

    async def _is_there(self, header: Any, attempts: Attempts) -> bool:
        """Return whether a tensor was put with this header."""
        try:
            await self._engine.put_tensor(header, None, attempts, self.server_instance)
        except CallError as error:
            if error.reason is not Reason.PAYLOAD_MISSING:
                raise
            return False
        return True

    async def _put_state(
        self, weight: Tensor, state: str, values: Any, updates: int
    ) -> None:
        """Put an optimizer state of a weight, and the number of its updates."""
        elements, shape = put_operand(values, state)
        header = self.state_header(weight, state, shape, updates)
        await self._put(header, elements)

    async def _elements(self, tensor: Tensor | TensorInfo, state: str = "") -> Array:
        request = pb2.GetTensorRequest(
            session=self.token, tensor=tensor.number, state=state
        )
        size_bytes = elements_bytes(tensor)

        async def attempt(attempts: Attempts) -> Array:
            return await self._engine.get_tensor(
                request, size_bytes, attempts, self.server_instance
            )

        return await self._retried("GetTensor", attempt)

    async def _retried(
        self, name: str, attempt: Callable[[Attempts], Awaitable[R]]
    ) -> R:
        """Return the result of the first successful attempt.

        Args:
            name: The method.
            attempt: Makes an attempt, in the time that is left.

        Raises:
            GradwireError: The last attempt failed.
        """
        attempts = self._attempts(name, self._timeout_s)
        return await self._engine.retry(attempts, lambda: attempt(attempts))

    def _attempts(self, name: str, timeout_s: float | None) -> Attempts:
        """Return the attempts of a call that begins now."""
        engine = self._client_engine
        return engine.session_attempts(name, timeout_s, self._id, self.affinity)

    def _job(
        self,
        given: Mapping[Matrix, Any],
        out: Mapping[str, Any] | None,
        results: Sequence[Matrix],
        options: SessionJobOptions,
        *,
        swapped: bool,
        gradients: Mapping[Matrix, Tensor] = MappingProxyType({}),
        context: Context | None = None,
        **keeping: Any,
    ) -> ArrayJob:
        """Create a job, and number its contributions to gradients.

        Args:
            given: Its operands.
            out: Arrays for its results, by name.
            results: Its results.
            options: The caller's options.
            swapped: Whether W is transposed.
            gradients: Gradients for results.
            context: The context that contributes to them; None: each call does.
            **keeping: As for `keeping`.

        Raises:
            InputError: An argument is invalid; nothing was numbered.
        """
        into = {matrix: KeptResult(own.number) for matrix, own in gradients.items()}
        kept = self.keeping(given, into=into, **keeping)
        dtypes = result_dtypes(
            options.get("result_dtype"), gradients.items(), swapped=swapped
        )
        options = {**options, "result_dtype": dtypes}
        parsed = parse_options(results=[each.label for each in results], **options)
        whole = {each: given.get(each) for each in (Matrix.X, Matrix.W, Matrix.DY)}
        jobs = self._client_engine.jobs
        job = jobs.session_job(whole, out, RESULTS, parsed, kept)
        # Parts are numbered now that the arguments are valid: a step would wait for
        # one that is never sent.
        for matrix, own in gradients.items():
            part = self.contribution(own, context.parts if context else {})
            into[matrix] = KeptResult(own.number, part)
        return job

    async def _run(self, job: ArrayJob) -> Receipt:
        return self._remember(await self._engine.run(job))

    @property
    def _timeout_s(self) -> float | None:
        return self._client_engine.jobs.timeout_s


def _named(out: Any, result: Matrix) -> dict[str, Any] | None:
    return None if out is None else {result.label: out}


_DEFAULT = tuple(each.label for each in DEFAULT_RESULTS)
