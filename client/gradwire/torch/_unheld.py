"""Finds weights in a session that no optimizer steps.

`torch.optim.AdamW(model.parameters())` knows the local parameters alone. It would train
them, and the weights on the server would stay as they are, without a word.
"""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from typing import Any

from torch.optim.optimizer import register_optimizer_step_pre_hook

from gradwire.torch._weight import Weight

_lock = threading.Lock()
_held: weakref.WeakSet[Weight] = weakref.WeakSet()
_unheld: weakref.WeakSet[Weight] = weakref.WeakSet()


def hold(weight: Weight) -> None:
    """Note that an `Optimizer` steps a weight."""
    with _lock:
        _held.add(weight)
        _unheld.discard(weight)


def contributed(weight: Weight) -> None:
    """Note that a backward pass adds to a weight's gradient."""
    if weight in _held:
        return
    with _lock:
        _unheld.add(weight)
        _watch_steps()


@functools.cache
def _watch_steps() -> None:
    register_optimizer_step_pre_hook(_warn)


def _warn(_optimizer: Any, _args: Any, _options: Any) -> None:
    """Warn, at a step of any optimizer in the process, of weights that none steps."""
    if not _unheld:
        return
    with _lock:
        # Where steps are made on the server, somebody calls Session.step.
        forgotten = [each for each in _unheld if not each.session.step_count]
        _held.update(_unheld)  # once for each weight
        _unheld.clear()
    if forgotten:
        warnings.warn(
            f"no optimizer updates {len(forgotten)} weights on the server, such as"
            f" {forgotten[0].name!r}, which have gradients: model.parameters() has"
            " the local ones only; use gradwire.torch.optimizer(model, ...), after"
            " offload",
            stacklevel=3,
        )
