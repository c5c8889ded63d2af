"""Finds weights in a session that no optimizer steps.

`torch.optim.AdamW(model.parameters())` knows the local parameters alone. It would train
them, and the weights on the server would stay as they are, without a word.
"""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from gradwire._client._sync.session import Session
from gradwire.torch._weight import Weight

_lock = threading.Lock()
_held: weakref.WeakSet[Weight] = weakref.WeakSet()
_unheld: weakref.WeakSet[Weight] = weakref.WeakSet()
_stepped: weakref.WeakSet[Weight] = weakref.WeakSet()
"""Those that an `Optimizer` steps."""
_beside: weakref.WeakKeyDictionary[Weight, list[weakref.ref[torch.nn.Parameter]]] = (
    weakref.WeakKeyDictionary()
)
"""The local parameters of each weight's model."""
_of_optimizers: weakref.WeakKeyDictionary[Session, int] = weakref.WeakKeyDictionary()
"""The steps that each `Optimizer` has made in a session, all together."""
_at_first: weakref.WeakKeyDictionary[Weight, int] = weakref.WeakKeyDictionary()
"""The other steps of a weight's session when it first had a gradient."""


def stands_beside(weight: Weight, parameters: Iterable[torch.nn.Parameter]) -> None:
    """Note a weight's model: an optimizer of these parameters should step it, too.

    Args:
        weight: The weight.
        parameters: Local parameters, those included that the weight stands for.
    """
    with _lock:
        _beside.setdefault(weight, []).extend(weakref.ref(each) for each in parameters)


def hold(weight: Weight) -> bool:
    """Note that an `Optimizer` steps a weight.

    Returns:
        Whether another one may have done so before.
    """
    with _lock:
        before = weight in _held
        _held.add(weight)
        _stepped.add(weight)
        _unheld.discard(weight)
    return before


def is_stepped(weight: Weight) -> bool:
    """Return whether an `Optimizer` steps a weight."""
    return weight in _stepped


def contributed(weight: Weight) -> None:
    """Note that a backward pass adds to a weight's gradient."""
    if weight in _held:
        return
    with _lock:
        _unheld.add(weight)
        _at_first.setdefault(weight, _other_steps(weight.session))
        _watch_steps()


def stepped(session: Session) -> None:
    """Note that an `Optimizer` has made a step in a session."""
    with _lock:
        _of_optimizers[session] = _of_optimizers.get(session, 0) + 1


def _other_steps(session: Session) -> int:
    """Return how many steps of a session no `Optimizer` has made."""
    return session.step_count - _of_optimizers.get(session, 0)


@functools.cache
def _watch_steps() -> None:
    register_optimizer_step_pre_hook(_warn)


def _warn(optimizer: torch.optim.Optimizer, _args: Any, _options: Any) -> None:
    """Warn, at a step of a model's optimizer, of its weights that none steps."""
    if not _unheld:
        return
    steps = {id(each) for group in optimizer.param_groups for each in group["params"]}
    with _lock:
        of_model = [
            weight
            for weight in _unheld
            if any(id(each()) in steps for each in _beside.get(weight, ()))
        ]
        _held.update(of_model)  # once for each weight
        _unheld.difference_update(of_model)
        # Where steps are made on the server, somebody calls Session.step.
        forgotten = [
            each for each in of_model if _other_steps(each.session) == _at_first[each]
        ]
    if forgotten:
        warnings.warn(
            f"no optimizer updates {len(forgotten)} weights on the server, such as"
            f" {forgotten[0].name!r}, which have gradients: model.parameters() has"
            " the local ones only; use gradwire.torch.optimizer(model, ...), after"
            " offload",
            stacklevel=3,
        )
