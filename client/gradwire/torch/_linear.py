"""A linear layer with its weight in a session."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from gradwire._api.errors import ClientStateError, InputError
from gradwire._api.options import DtypeLike, parse_dtype
from gradwire._client._sync.session import Session
from gradwire._core.kept import Tensor
from gradwire.torch._kept_product import multiply
from gradwire.torch._local_only import check_frozen, check_zeroed
from gradwire.torch._products import autocast
from gradwire.torch._unheld import stands_beside
from gradwire.torch._weight import Weight
from gradwire_protocol.dtypes import WIRE_DTYPES


class Linear(torch.nn.Module):
    """`torch.nn.Linear` with its weight in a session.

    The forward pass sends X and receives Y. In training mode, X stays in the session
    for the backward pass, which sends dY and receives dX; dW is added to the gradient
    in the session. An `Optimizer` steps the weight there. The bias is an ordinary
    parameter.

    `state_dict` fetches the weight, and `load_state_dict` puts it: both exchange files
    with `torch.nn.Linear`. `copy.deepcopy`, `pickle` and `torch.save` of a model with
    the layer make it a `torch.nn.Linear`. Second derivatives are an error.

    Args:
        in_features: Size of an input row.
        out_features: Size of an output row.
        bias: Whether to add a bias.
        session: The session, which must be open.
        wire_dtype: "bfloat16" or "float16": float32 rows are rounded to it and sent in
            half the bytes, and the products take a copy of the weight that is rounded
            to it.
        compute_dtype: "bfloat16" or "float16": keep a copy of the float32 weight,
            rounded to it, for rows of that dtype, which autocast makes. Without one,
            such rows are sent as float32.
        device: Device of the bias.
        dtype: Dtype of weight and bias.
        name: Name of the weight in the session.

    Attributes:
        weight: A `Weight`, without elements.
        bias: The bias, or None.

    Raises:
        InputError: An argument is invalid.
        SessionFullError: The session's `keep` is too small.

    Example:
        >>> layer = gradwire.torch.Linear(4096, 1024, session=session)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        session: Session,
        wire_dtype: DtypeLike = None,
        compute_dtype: DtypeLike = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        name: str = "",
    ) -> None:
        super().__init__()
        local = torch.nn.Linear(
            in_features, out_features, bias=bias, device=device, dtype=dtype
        )
        weight = Weight(
            session,
            local.weight,
            wire_dtype=wire_dtype,
            compute_dtype=compute_dtype,
            name=name,
        )
        self._set(local, weight, wire_dtype)

    @classmethod
    def of(
        cls, local: torch.nn.Linear, weight: Weight, wire_dtype: DtypeLike = None
    ) -> Linear:
        """Create the layer that stands for a local one.

        Args:
            local: The local layer, from which bias, mode and hooks are taken.
            weight: Its weight, in a session.
            wire_dtype: As for `Linear`.
        """
        layer = cls.__new__(cls)
        torch.nn.Module.__init__(layer)
        layer._set(local, weight, wire_dtype)
        take_hooks(layer, local)
        return layer

    def _set(
        self, local: torch.nn.Linear, weight: Weight, wire_dtype: DtypeLike
    ) -> None:
        self.in_features, self.out_features = local.in_features, local.out_features
        self.wire_dtype: str | None = None
        if wire_dtype is not None:
            self.wire_dtype = parse_dtype(wire_dtype, "wire_dtype", WIRE_DTYPES).label
        self._weight = weight
        stands_beside(weight, local.parameters())
        self.register_parameter("bias", local.bias)
        # Behind the bias after a parametrization was removed: an optimizer's state
        # numbers parameters by their order.
        self._bias_first = next(iter(local._parameters), "weight") == "bias"
        # Whether weight and bias required gradients in the last pass with gradients.
        self._required = (
            weight.requires_grad,
            local.bias is not None and local.bias.requires_grad,
        )
        self.train(local.training)

    @property
    def weight(self) -> Weight:
        """The weight, a handle without elements."""
        return self._weight

    @property
    def gradient(self) -> Tensor | None:
        """The weight's gradient in the session; None if it requires none."""
        return self._weight.gradient

    @property
    def session(self) -> Session:
        """The session."""
        return self._weight.session

    def in_order(self, weight: Any) -> dict[str, Any]:
        """Return weight and bias in the order of the local layer."""
        if self._bias_first:
            return {**self._parameters, "weight": weight}
        return {"weight": weight, **self._parameters}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute x wᵀ + bias.

        Args:
            x: Shape (..., in_features).

        Returns:
            Shape (..., out_features).

        Raises:
            ClientStateError: The model is in `DistributedDataParallel`, with several
                processes, and the weight is not frozen.
            InputError: The shape or the dtype is another one.
            GradwireError: The job failed.
        """
        if self._weight.requires_grad:
            _refuse_replicas()
        if not isinstance(x, torch.Tensor):
            raise InputError(f"x is a {type(x).__qualname__}: expected a tensor")
        if x.is_meta:
            raise InputError("x is on meta: it has no elements to be sent")
        if x.ndim < 1 or x.shape[-1] != self.in_features:
            raise InputError(
                f"x has shape {tuple(x.shape)}: expected (..., {self.in_features})"
            )
        to = autocast(x)
        if to is not None:
            x = x.to(to)
        elif x.dtype != self._weight.dtype:
            raise InputError(
                f"x is {x.dtype} and the layer {self._weight.dtype}: expected one dtype"
            )
        passes_train = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if self.bias is not None and passes_train:
            self._required = check_frozen(self._weight, self.bias, self._required)
            check_zeroed(self._weight, self.bias)
        rows = x if x.ndim > 1 else x.unsqueeze(0)
        y = multiply(rows, self._weight, self.wire_dtype, keep=self.training)
        y = y if x.ndim > 1 else y.squeeze(0)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Describe the layer as `torch.nn.Linear` does, with its options."""
        text = f"in_features={self.in_features}, out_features={self.out_features}"
        text += f", bias={self.bias is not None}"
        if self.wire_dtype is not None:
            text += f", wire_dtype={self.wire_dtype!r}"
        return text if self._weight.requires_grad else f"{text}, frozen"

    def requires_grad_(self, requires_grad: bool = True) -> Linear:
        """Set whether weight and bias require gradients.

        `requires_grad_` of a module that contains this one sets it for the bias only.
        """
        super().requires_grad_(requires_grad)
        self._weight.requires_grad = requires_grad
        return self

    def reset_parameters(self) -> None:
        """Initialize weight and bias anew, as `torch.nn.Linear` does.

        Raises:
            GradwireError: The call failed.
        """
        local = torch.nn.Linear(
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            dtype=self._weight.dtype,
        )
        self._weight.put(local.weight)
        if self.bias is not None:
            with torch.no_grad():
                self.bias.copy_(local.bias)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of weight and bias.

        `zero_grad` of a module that contains this one forgets that of the bias only;
        that of an `Optimizer` forgets all.
        """
        super().zero_grad(set_to_none)
        self._weight.zero_grad()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(
                "the weight is kept on a server: layer.weight.put(tensor) replaces its"
                " elements"
            )
        super().__setattr__(name, value)

    def __copy__(self) -> Linear:
        layer = type(self).__new__(type(self))
        layer.__setstate__(self.__getstate__())
        return layer

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Copies and pickles are of the local layer, which needs no server and no
        # gradwire. The weight becomes a parameter when it is copied or pickled itself,
        # so that layers with one weight still share it.
        state: dict[str, Any] = self.__getstate__()  # type: ignore[assignment]
        weight = state.pop("_weight")
        del state["wire_dtype"], state["_required"], state["_bias_first"]
        state["_parameters"] = self.in_order(weight)
        return object.__new__, (torch.nn.Linear,), state

    def _apply(self, fn: Any, recurse: bool = True) -> Linear:
        weight = self._weight
        applied = fn(torch.empty(0, dtype=weight.dtype, device=weight.device))
        if applied.dtype is not weight.dtype:
            raise InputError(
                f"the weight is kept on a server as {weight.dtype}: convert the model"
                " before offload"
            )
        weight.device = applied.device
        super()._apply(fn, recurse)
        return self

    def _save_to_state_dict(
        self, destination: Any, prefix: str, keep_vars: bool
    ) -> None:
        destination[f"{prefix}weight"] = self._weight.fetch_for(destination)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = f"{prefix}weight"
        rest = {name: value for name, value in state_dict.items() if name != key}
        super()._load_from_state_dict(
            rest,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        if key not in state_dict:
            if strict:
                missing_keys.append(key)
        elif not isinstance(state_dict[key], torch.Tensor):
            error_msgs.append(
                f'While copying the parameter named "{key}", expected torch.Tensor or'
                " Tensor-like object from checkpoint but received"
                f" {type(state_dict[key])}"
            )
        elif tuple(state_dict[key].shape) != tuple(self._weight.shape):
            error_msgs.append(
                f"size mismatch for {key}: copying a param with shape"
                f" {state_dict[key].shape} from checkpoint, the shape in current"
                f" model is {self._weight.shape}."
            )
        else:
            self._weight.put(state_dict[key])


def _refuse_replicas() -> None:
    """Refuse data parallelism, whose processes would train different weights.

    Raises:
        ClientStateError: `DistributedDataParallel` runs the layer in several processes.
    """
    # It does not see weights that are no parameters of the module.
    replica = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if replica is not None and replica.process_group.size() > 1:
        raise ClientStateError(
            "DistributedDataParallel does not average the gradients of weights on a"
            " server: train the model in one process, or freeze these weights before"
            " offload"
        )


def take_hooks(layer: torch.nn.Module, other: torch.nn.Module) -> None:
    """Give a layer the hooks of the layer that it replaces."""
    for name, hooks in vars(other).items():
        # The very dictionaries, from which handles remove hooks.
        if name.endswith(("_hook", "_hooks")) or "_hooks_" in name:
            layer.__dict__[name] = hooks
