"""Optimizers of models with weights in a session."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.amp.grad_scaler import OptState

from gradwire._api import optimizers
from gradwire._api.errors import ClientStateError, InputError
from gradwire._api.session_types import TensorInfo
from gradwire._client._sync.session import Session
from gradwire._core import interrupts
from gradwire.torch._kept_x import drop_left_over
from gradwire.torch._local_only import GradientVersions
from gradwire.torch._offload import named_parameters
from gradwire.torch._unheld import hold, stepped
from gradwire.torch._weight import Weight, from_numpy
from gradwire_protocol.optimizers import CLIP_EPSILON

_CLASSES = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)

_REFUSED = ("amsgrad", "maximize", "differentiable", "capturable")
"""Options that change what a step computes, or how, and that a server lacks."""


def optimizer(
    parameters: torch.nn.Module | Iterable[Any],
    torch_optimizer_class: type[torch.optim.Optimizer],
    **options: Any,
) -> Optimizer:
    """Create an optimizer of weights in a session and of local parameters.

    The server updates the weights with the formulas of the PyTorch class, and an
    instance of that class updates the local parameters. As in PyTorch, a new optimizer
    has no states: those that another one has made for a weight are forgotten.

    Args:
        parameters: A model; or parameters and `Weight` objects, as `named_parameters`
            yields them; or dictionaries of groups of them, as for any optimizer.
        torch_optimizer_class: `torch.optim.SGD`, `torch.optim.Adam` or
            `torch.optim.AdamW`.
        **options: The options of that class. `amsgrad`, `maximize`, `differentiable`
            and `capturable` are refused.

    Raises:
        InputError: An argument is invalid, or the weights are in several sessions.
        GradwireError: States could not be forgotten.

    Example:
        >>> opt = gradwire.torch.optimizer(model, torch.optim.AdamW, lr=3e-4)
        >>> for x, target in data:
        ...     loss_of(model(x), target).backward()
        ...     opt.step(max_norm=1.0)
        ...     opt.zero_grad()
    """
    return Optimizer(parameters, torch_optimizer_class, **options)


class Optimizer(torch.optim.Optimizer):
    """An optimizer of weights in a session and of local parameters.

    Create it with `optimizer`. Learning-rate schedulers change its `param_groups`,
    which hold for the weights in the session too, although only local parameters are
    listed in them.

    Attributes:
        local: The PyTorch optimizer of the local parameters.
        total_norm: The norm of all gradients in the last step, before clipping; 0
            before the first.
        skipped: Whether the last step was skipped, because a gradient had NaN or Inf.
    """

    # GradScaler.step would hand over its scale, which is refused with a sentence.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        parameters: torch.nn.Module | Iterable[Any],
        torch_optimizer_class: type[torch.optim.Optimizer],
        **options: Any,
    ) -> None:
        if torch_optimizer_class not in _CLASSES:
            names = ", ".join(f"torch.optim.{each.__name__}" for each in _CLASSES)
            raise InputError(
                f"torch_optimizer_class is {torch_optimizer_class!r}: expected one of"
                f" {names}"
            )
        groups = _groups(parameters)
        # Parameters and weights of each group, in the order of the caller.
        self._members: list[list[Any]] = [group["params"] for group in groups]
        _check_once(self._weights())
        self._session = _session(self._weights())
        self.local = torch_optimizer_class(
            [{**group, "params": _tensors(group["params"])} for group in groups],
            **options,
        )
        for group in self.local.param_groups:
            _remote_optimizer(self.local, group)
        self.total_norm = 0.0
        self.skipped = False
        self._made: tuple[bool, float] | None = None
        """Whether the step is skipped, and its norm: from the step on the server until
        all is done."""
        self._prepared = False
        """Whether the local gradients have been scaled and clipped for that."""
        self._updated = False
        """Whether the local parameters have been updated, too."""
        self._versions = GradientVersions()
        self._complete = False
        super().__init__(self.local.param_groups, self.local.defaults)
        self._complete = True
        self._share()
        self._hold(self._weights())
        for group in self.local.param_groups:
            self._versions.watch(group["params"])

    def _hold(self, weights: list[Weight]) -> None:
        """Note that this optimizer steps weights, whose states begin anew."""
        before = [weight for weight in weights if hold(weight)]
        infos = self._infos() if before else {}
        for weight in before:
            if infos[weight.tensor.number].updates:
                weight.forget_states()

    def _share(self) -> None:
        """Have one list of groups and one state with the local optimizer."""
        self.param_groups = self.local.param_groups
        self.state = self.local.state

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        max_norm: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Any:
        """Update all weights and parameters.

        The step is made on the server first: if that fails, nothing has changed. It
        leaves no gradients there, so that `zero_grad` sends nothing afterwards.

        Args:
            closure: Computes the loss and its gradients anew, as for any optimizer.
            max_norm: The largest norm of all gradients together, local ones included,
                to which they are scaled down, as by
                `torch.nn.utils.clip_grad_norm_`; None, or infinite: no limit.
            scaler: A scaler by which the loss was scaled: use
                ``opt.step(scaler=scaler)`` for ``scaler.step(opt)``. A step with NaN
                or Inf is skipped. ``scaler.update()`` is called as usual, and
                ``scaler.unscale_(opt)`` is not.

        Returns:
            What the closure returns; None without one.

        Raises:
            InputError: An argument is invalid, or a local gradient has NaN or Inf and
                there is no scaler. Nothing has changed.
            StepConflictError: A gradient lacks a contribution, because a backward
                pass failed: call `zero_grad` and repeat the passes.
            GradwireError: The server failed. The step can be repeated.
        """
        if hasattr(self, "grad_scale"):
            # GradScaler.step would remove them after a step only.
            del self.grad_scale, self.found_inf
            raise InputError(
                "scaler.step(opt) does not know the gradients on the server: call"
                " opt.step(scaler=scaler)"
            )
        if closure is not None and not callable(closure):
            raise InputError(
                f"closure is {closure!r}: expected a function, or options by name, as"
                " in opt.step(max_norm=1.0)"
            )
        max_norm = _parsed_norm(max_norm)
        if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
            raise InputError(
                f"scaler is a {type(scaler).__qualname__}: expected a"
                " torch.amp.GradScaler"
            )
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        scale = 1.0
        if scaler is not None and scaler.is_enabled():
            scale = scaler.get_scale()
        with torch.no_grad():
            self._step(max_norm, scaler, scale)
        return result

    def _step(
        self, max_norm: float | None, scaler: torch.amp.GradScaler | None, scale: float
    ) -> None:
        self._check_weights()
        if self._session is not None:
            # First: if this call fails, nothing has changed.
            drop_left_over(self._session)
        gradients = self._gradients()
        squares = _sum_of_squares(gradients) / scale**2
        scaled = scaler is not None and scaler.is_enabled()
        if scaled and not gradients:
            raise InputError(
                "there is no local gradient, by which a GradScaler could know of NaN"
                " and Inf: scale the loss by a constant instead"
            )
        repeats = self._made is not None and not any(
            weight.touched for weight in self._weights()
        )
        if scaler is not None and scaled and not repeats:
            _check_scaled(scaler, self)
        if not repeats:
            self._forget_outcome()
            if any(weight.requires_grad for weight in self._weights()):
                self._versions.check()
        # Ctrl-C comes while the server's answer is waited for, or when all is done.
        with interrupts.held():
            self.skipped, self.total_norm = False, math.sqrt(squares)
            if self._made is not None and repeats:
                # Of a step that was interrupted here, after that on the server.
                self.skipped, self.total_norm = self._made
            elif scaled and not math.isfinite(squares):
                self.skipped = True
                self._clear()
            elif self._session is not None and (remote := self._remote()):
                if not math.isfinite(squares):
                    raise InputError(_not_finite(gradients))
                made = self._session.step(
                    *remote[0],
                    *remote[1:],
                    max_norm=max_norm or 0.0,
                    local_sum_of_squares=squares,
                    inverse_scale=1 / scale,
                    skip_nonfinite=scaled,
                )
                stepped(self._session)
                self.skipped, self.total_norm = made.skipped, made.total_norm
                for weight in self._weights():
                    weight.touched = False
            if self._session is not None:
                self._made = self.skipped, self.total_norm
            self._update_local(gradients, max_norm, scaler if scaled else None)
        self._forget_outcome()

    def _forget_outcome(self) -> None:
        self._made, self._prepared, self._updated = None, False, False

    def _update_local(
        self,
        gradients: list[torch.Tensor],
        max_norm: float | None,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        """Do to the local parameters what was done to the weights on the server."""
        if self._updated:
            return
        if not self._prepared:
            if scaler is not None:
                if self.skipped:
                    # The scaler looks for NaN and Inf in local gradients alone.
                    first = gradients[0]
                    (first._values() if first.is_sparse else first).fill_(math.inf)
                scaler.unscale_(self)
            if max_norm is not None and not self.skipped:
                factor = min(1.0, max_norm / (self.total_norm + CLIP_EPSILON))
                for gradient in gradients:
                    gradient.mul_(factor)
            self._prepared = True
        if not self.skipped:
            self.local.step()
        self._updated = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, those on the server included.

        Args:
            set_to_none: As for any optimizer, for local parameters. Weights on the
                server have no gradient in both cases: a step leaves them as they are.

        Raises:
            GradwireError: The server failed.
        """
        self._forget_outcome()
        self._versions.forget()
        self.local.zero_grad(set_to_none)
        self._clear()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, of weights, or of both."""
        if not self._complete:
            return  # The base class adds those that self.local has.
        (group,) = _groups([param_group])
        weights = [*self._weights(), *_remote_weights(group["params"])]
        _check_once(weights)
        session = _session(weights)
        local = {**group, "params": _tensors(group["params"])}
        self.local.add_param_group(local)
        _remote_optimizer(self.local, self.local.param_groups[-1])
        self._members.append(group["params"])
        self._session = session
        self._hold(_remote_weights(group["params"]))
        self._versions.watch(local["params"])

    def state_dict(self) -> dict[str, Any]:
        """Return the state as the local optimizer of the local model would.

        The states of weights are fetched. `torch.optim` classes can load the result.

        Raises:
            GradwireError: The server failed.
        """
        self._check_weights()
        packed = self.local.state_dict()
        infos = self._infos()
        states: dict[int, Any] = {}
        groups = []
        number = 0
        for group, members in zip(packed["param_groups"], self._members, strict=True):
            local = iter(group["params"])
            first = number
            for member in members:
                if isinstance(member, Weight):
                    state = _state_of(member, infos[member.tensor.number])
                else:
                    state = packed["state"].get(next(local))
                if state:
                    states[number] = state
                number += 1
            groups.append({**group, "params": list(range(first, number))})
        return {"state": states, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state of this class, or of the class of `local`, and put it.

        Raises:
            InputError: The state has other groups.
            GradwireError: The server failed.
        """
        _check_form(state_dict, [len(members) for members in self._members])
        states: dict[int, Any] = {}
        groups = []
        remote = []
        number = 0
        for group, members in zip(
            state_dict["param_groups"], self._members, strict=True
        ):
            first = number
            for index, member in zip(group["params"], members, strict=True):
                state = state_dict["state"].get(index)
                if isinstance(member, Weight):
                    remote.append((member, state))
                    continue
                if state:
                    states[number] = state
                number += 1
            groups.append({**group, "params": list(range(first, number))})
        for group in groups:
            try:
                _remote_optimizer(self.local, group)
            except KeyError as error:
                raise InputError(
                    f"a group of the state has no {error}: it is not of"
                    f" torch.optim.{type(self.local).__name__}"
                ) from None
        self._check_weights()
        for weight, state in remote:
            _check_state(weight, state or {})
        infos = self._infos()
        for weight, state in remote:
            if state:
                _put_state(weight, state)
            elif infos[weight.tensor.number].states:
                weight.forget_states()
        self.local.load_state_dict({"state": states, "param_groups": groups})
        self._share()

    def _check_weights(self) -> None:
        """Check that no weight has left the session.

        Raises:
            ClientStateError: One is local again.
        """
        gone = [weight for weight in self._weights() if weight.made_local]
        if gone:
            raise ClientStateError(
                f"{len(gone)} weights of this optimizer, such as {gone[0].name!r}, are"
                " local again, by to_local, and their states are gone: call"
                " opt.state_dict() before to_local, and load it into an optimizer of"
                " the local model"
            )

    def _infos(self) -> dict[int, TensorInfo]:
        """Return the descriptions of the session's tensors, by number."""
        if self._session is None:
            return {}
        return {each.number: each for each in self._session.describe().tensors}

    def _weights(self) -> list[Weight]:
        return [each for members in self._members for each in _remote_weights(members)]

    def _gradients(self) -> list[torch.Tensor]:
        """Return the gradients of the local parameters."""
        return [
            parameter.grad
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]

    def _remote(self) -> list[tuple[optimizers.Optimizer, dict[Any, Any]]]:
        """Return pairs of an optimizer and the weights' gradients, for the session."""
        pairs = []
        for group, members in zip(self.param_groups, self._members, strict=True):
            weights = {
                weight.tensor: weight.gradient
                for weight in _remote_weights(members)
                if weight.requires_grad
            }
            if weights:
                pairs.append((_remote_optimizer(self.local, group), weights))
        return pairs

    def _clear(self) -> None:
        for weight in self._weights():
            weight.zero_grad()

    def __getstate__(self) -> Any:
        raise TypeError(
            "an optimizer of weights on a server cannot be copied or pickled: use its"
            " state_dict()"
        )


def _groups(parameters: Any) -> list[dict[str, Any]]:
    if isinstance(parameters, torch.optim.Optimizer):
        raise InputError(
            f"parameters is a {type(parameters).__qualname__}: expected a model, and"
            " the class of the optimizer after it"
        )
    if isinstance(parameters, torch.nn.Module):
        parameters = [each for _, each in named_parameters(parameters)]
    given = list(parameters)
    if given and all(isinstance(each, dict) for each in given):
        return [{**group, "params": _listed(group["params"])} for group in given]
    return [{"params": _listed(given)}]


def _listed(parameters: Any) -> list[Any]:
    if isinstance(parameters, torch.Tensor | Weight):
        return [parameters]
    # As named_parameters yields them.
    return [each[1] if isinstance(each, tuple) else each for each in parameters]


def _tensors(members: list[Any]) -> list[Any]:
    return [each for each in members if not isinstance(each, Weight)]


def _remote_weights(members: list[Any]) -> list[Weight]:
    return [each for each in members if isinstance(each, Weight)]


def _check_once(weights: list[Weight]) -> None:
    if len(set(weights)) < len(weights):
        raise InputError("a weight is in two groups, or twice in one")


def _session(weights: list[Weight]) -> Session | None:
    """Return the session of all weights.

    Raises:
        InputError: There are several.
    """
    sessions = {weight.session for weight in weights}
    if len(sessions) > 1:
        raise InputError(
            f"the weights are in {len(sessions)} sessions: make an optimizer for each,"
            " without a common norm"
        )
    return next(iter(sessions), None)


def _remote_optimizer(
    local: torch.optim.Optimizer, group: Mapping[str, Any]
) -> optimizers.Optimizer:
    """Return the server's optimizer of a group.

    Raises:
        InputError: An option is not supported.
    """
    for name in _REFUSED:
        if group.get(name):
            raise InputError(
                f"{name} is {group[name]!r}: a server does not offer it; omit it"
            )
    lr, decay = float(group["lr"]), float(group["weight_decay"])
    if isinstance(local, torch.optim.SGD):
        return optimizers.SGD(
            lr,
            float(group["momentum"]),
            float(group["dampening"]),
            decay,
            bool(group["nesterov"]),
        )
    betas = (float(group["betas"][0]), float(group["betas"][1]))
    decoupled = isinstance(local, torch.optim.AdamW) or group.get(
        "decoupled_weight_decay"
    )
    kind = optimizers.AdamW if decoupled else optimizers.Adam
    return kind(lr, betas, float(group["eps"]), decay)


def _parsed_norm(max_norm: Any) -> float | None:
    """Return the largest norm; None: no limit.

    Raises:
        InputError: It is no number, or not positive.
    """
    if max_norm is None:
        return None
    try:
        value = float(max_norm)
    except (TypeError, ValueError):
        value = math.nan
    if not value > 0:
        raise InputError(f"max_norm is {max_norm!r}: expected more than 0, or None")
    return None if value == math.inf else value


def _check_scaled(scaler: torch.amp.GradScaler, optimizer: Optimizer) -> None:
    """Check that an optimizer's gradients are still scaled.

    Raises:
        InputError: The scaler has unscaled them.
    """
    # Another unscaling would be an error, after the step on the server.
    state = scaler._per_optimizer_states[id(optimizer)]
    if state["stage"] is not OptState.READY:
        raise InputError(
            "the scaler has unscaled the gradients of this optimizer since its last"
            " update(): leave out scaler.unscale_(opt), which"
            " opt.step(scaler=scaler) does, and call scaler.update() after each step"
        )


def _elements(gradient: torch.Tensor) -> torch.Tensor:
    """Return a gradient's elements; of a sparse one, as of an embedding, its own."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _sum_of_squares(gradients: list[torch.Tensor]) -> float:
    """Return the sum of squares of all elements, in float64."""
    return float(
        sum(
            torch.linalg.vector_norm(_elements(each), dtype=torch.float64).item() ** 2
            for each in gradients
        )
    )


def _not_finite(gradients: list[torch.Tensor]) -> str:
    """Say which gradients make the norm NaN or infinite."""
    bad = [
        each for each in gradients if not _elements(each).isfinite().all()
    ] or gradients
    shapes = ", ".join(str(tuple(each.shape)) for each in bad[:3])
    more = ", ..." if len(bad) > 3 else ""
    return (
        f"the gradients of {len(bad)} of {len(gradients)} local parameters have NaN or"
        f" Inf, or are too large for a norm (shapes {shapes}{more}): no step was made,"
        " and opt.zero_grad() forgets the gradients; with a GradScaler,"
        " opt.step(scaler=scaler) skips such a step"
    )


def _state_of(weight: Weight, info: Any) -> dict[str, Any]:
    """Return a weight's optimizer state, as PyTorch has it."""
    state: dict[str, Any] = {
        name: from_numpy(weight.session.get(weight.tensor, state=name))
        for name in info.states
    }
    if "exp_avg" in state:
        state = {"step": torch.tensor(float(info.updates)), **state}
    return state


def _check_form(state_dict: Any, sizes: list[int]) -> None:
    """Check that something is a state of an optimizer with groups of these sizes.

    Raises:
        InputError: It is none, or has other groups.
    """
    if not isinstance(state_dict, Mapping):
        raise InputError(
            f"the state is a {type(state_dict).__qualname__}: expected what an"
            " optimizer's state_dict() returned"
        )
    if not {"state", "param_groups"} <= set(state_dict):
        raise InputError(
            "the state has no 'state' and 'param_groups': expected what an"
            " optimizer's state_dict() returned"
        )
    given = [len(group["params"]) for group in state_dict["param_groups"]]
    if given != sizes:
        raise InputError(
            f"the state has groups of {given} parameters: expected {sizes}"
        )


def _check_state(weight: Weight, state: Mapping[str, Any]) -> None:
    """Check a weight's state before anything is put.

    Raises:
        InputError: It has something else than tensors of the weight's shape.
    """
    for name, elements in state.items():
        if name == "step" or elements is None:
            continue
        if not isinstance(elements, torch.Tensor):
            raise InputError(
                f"{name} of the weight {weight.name!r} is a"
                f" {type(elements).__qualname__}: expected a tensor"
            )
        if elements.shape != weight.shape:
            raise InputError(
                f"{name} of the weight {weight.name!r} has shape"
                f" {tuple(elements.shape)}: expected {tuple(weight.shape)}"
            )


def _put_state(weight: Weight, state: Mapping[str, Any]) -> None:
    session, tensor = weight.session, weight.tensor
    updates = int(state.get("step", 1))
    for name, elements in state.items():
        if name == "step" or elements is None:
            continue
        values = elements.detach().cpu().to(getattr(torch, tensor.dtype))
        session._put_state(tensor, name, values, updates)
