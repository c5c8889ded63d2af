"""Models whose linear layers compute on a server, and back."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, TypeVar

import torch

from gradwire._api.errors import InputError
from gradwire._api.options import DtypeLike
from gradwire._client._sync.session import Session
from gradwire.torch._linear import Linear, take_hooks
from gradwire.torch._products import DTYPES
from gradwire.torch._unheld import stands_beside
from gradwire.torch._weight import Weight, check_session

Model = TypeVar("Model", bound=torch.nn.Module)


def offload(
    model: Model,
    session: Session,
    *,
    at_least: int = 512,
    wire_dtype: DtypeLike = None,
    compute_dtype: DtypeLike = None,
) -> Model:
    """Replace a model's large `torch.nn.Linear` layers by `Linear`, in place.

    A weight is put into the session once, however many layers share it. A weight that
    requires no gradient is frozen: its layers compute dX alone, and keep no X. Workers
    with the same frozen weights send them once (`Session.put`).

    These stay local: layers of a subclass of `torch.nn.Linear`, layers with
    parametrizations, and weights that something else uses too, such as an embedding
    that is tied to the last layer. If nothing is replaced, a `UserWarning` says why.
    Offload a model before its optimizer is made.

    Args:
        model: The model.
        session: The session, which must be open. It needs room for the weights, their
            gradients and optimizer states, and the X of each layer from its forward
            to its backward pass.
        at_least: A layer is replaced if in_features and out_features are both at least
            this. Small layers, such as the adapters of LoRA, are faster here.
        wire_dtype: As for `Linear`.
        compute_dtype: As for `Linear`.

    Returns:
        The model; its replacement, if it is a `torch.nn.Linear` itself.

    Raises:
        InputError: An argument is invalid.
        SessionFullError: The session's `keep` is too small. The model is as it was.

    Example:
        >>> model = gradwire.torch.offload(model, session, wire_dtype="bfloat16")
    """
    _check_model(model)
    check_session(session)
    if isinstance(at_least, bool) or not isinstance(at_least, int) or at_least < 0:
        raise InputError(f"at_least is {at_least!r}: expected a whole number")
    chosen = _chosen(model, at_least)
    if not chosen and not remote_layers(model):
        warnings.warn(_nothing_moved(model, at_least), stacklevel=2)
    weights: dict[torch.nn.Parameter, Weight] = {}
    try:
        for name, layer in chosen.items():
            if layer.weight not in weights:
                weights[layer.weight] = Weight(
                    session,
                    layer.weight,
                    requires_grad=layer.weight.requires_grad,
                    wire_dtype=wire_dtype,
                    compute_dtype=compute_dtype,
                    name=f"{name}.weight" if name else "weight",
                )
    except BaseException:
        _drop(list(weights.values()))
        raise
    for weight in weights.values():
        stands_beside(weight, model.parameters())
    replaced: dict[torch.nn.Module, torch.nn.Module] = {
        layer: Linear.of(layer, weights[layer.weight], _wire(layer, wire_dtype))
        for layer in chosen.values()
    }
    return _replace(model, replaced)


def to_local(model: Model) -> Model:
    """Replace a model's `Linear` layers by `torch.nn.Linear`, in place.

    The weights are fetched, and dropped from the session together with their
    gradients and optimizer states: call the optimizer's `state_dict` before. Gradients
    that no step has used are lost.

    Args:
        model: The model.

    Returns:
        The model; its replacement, if it is a `Linear` itself.

    Raises:
        GradwireError: A weight cannot be fetched. The model is as it was.

    Example:
        >>> torch.save(gradwire.torch.to_local(model), "model.pt")
    """
    _check_model(model)
    layers = remote_layers(model)
    parameters: dict[Weight, torch.nn.Parameter] = {}
    for layer in layers.values():
        weight = layer.weight
        if weight not in parameters:
            parameters[weight] = weight.to_parameter()
    replaced: dict[torch.nn.Module, torch.nn.Module] = {
        layer: _local(layer, parameters[layer.weight]) for layer in layers.values()
    }
    model = _replace(model, replaced)
    _drop(list(parameters))
    for weight in parameters:
        weight.made_local = True
    return model


def remote_layers(model: torch.nn.Module) -> dict[str, Linear]:
    """Return the model's layers with a weight in a session, by name.

    Example:
        >>> sum(each.weight.numel() for each in remote_layers(model).values())
        134217728
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Linear)
    }


def named_parameters(
    model: torch.nn.Module,
) -> Iterator[tuple[str, torch.nn.Parameter | Weight]]:
    """Iterate over names and parameters, with the weights in sessions.

    They have the names and the order that they have in the local model, each once. Use
    it for an optimizer's groups: a `Weight` has `ndim`, `shape` and `requires_grad`.

    Example:
        >>> weights = [p for _, p in named_parameters(model) if p.ndim >= 2]
    """
    seen: set[Any] = set()
    for prefix, module in model.named_modules():
        own: list[tuple[str, Any]] = list(module.named_parameters(recurse=False))
        if isinstance(module, Linear):
            own = [
                each
                for each in module.in_order(module.weight).items()
                if each[1] is not None
            ]
        for name, parameter in own:
            if parameter not in seen:
                seen.add(parameter)
                yield f"{prefix}.{name}" if prefix else name, parameter


def _check_model(model: Any) -> None:
    if not isinstance(model, torch.nn.Module):
        raise InputError(
            f"model is a {type(model).__qualname__}: expected a torch.nn.Module"
        )


def _nothing_moved(model: torch.nn.Module, at_least: int) -> str:
    """Say why no layer of a model is replaced."""
    sizes = [
        (min(each.in_features, each.out_features), each)
        for each in model.modules()
        if isinstance(each, torch.nn.Linear)
    ]
    text = "no layer was moved to the server: "
    if not sizes:
        return f"{text}the model has no torch.nn.Linear"
    size, layer = max(sizes, key=lambda pair: pair[0])
    if size < at_least:
        return (
            f"{text}at_least is {at_least}, and the model's largest torch.nn.Linear is"
            f" {layer.in_features} x {layer.out_features}"
        )
    return (
        f"{text}those of at least {at_least} x {at_least} are of a subclass of"
        " torch.nn.Linear, have parametrizations, or share their weights with other"
        " kinds of layers"
    )


def _chosen(model: torch.nn.Module, at_least: int) -> dict[str, torch.nn.Linear]:
    """Return the layers to replace, by name."""
    found = {
        name: module
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear
        and min(module.in_features, module.out_features) >= at_least
        # A parametrization computes the weight from other parameters.
        and set(module._parameters) == {"weight", "bias"}
        and not module._buffers
        and module.weight.dtype in DTYPES
    }
    users: dict[torch.nn.Parameter, set[torch.nn.Module]] = defaultdict(set)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users[parameter].add(module)
    layers = set(found.values())
    return {
        name: layer for name, layer in found.items() if users[layer.weight] <= layers
    }


def _wire(layer: torch.nn.Linear, wire_dtype: DtypeLike) -> DtypeLike:
    # Rows of 16 bits travel as they are.
    return wire_dtype if layer.weight.dtype is torch.float32 else None


def _local(layer: Linear, weight: torch.nn.Parameter) -> torch.nn.Linear:
    local = torch.nn.Linear(
        layer.in_features, layer.out_features, bias=False, device="meta"
    )
    local._parameters.clear()
    for name, parameter in layer.in_order(weight).items():
        local.register_parameter(name, parameter)
    local.train(layer.training)
    take_hooks(local, layer)
    return local


def _replace(model: Any, replaced: dict[torch.nn.Module, torch.nn.Module]) -> Any:
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child in replaced:
                module._modules[name] = replaced[child]
    return replaced.get(model, model)


def _drop(weights: list[Weight]) -> None:
    for weight in weights:
        tensors = [weight.tensor, weight.gradient]
        weight.session.drop(*(each for each in tensors if each is not None))
