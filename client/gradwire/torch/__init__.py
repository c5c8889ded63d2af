"""PyTorch through gradwire: products, layers and optimizers on a server.

Importing it needs PyTorch: ``pip install 'gradwire[torch]'``.

    import gradwire, torch
    import gradwire.torch

    with gradwire.connect("gpu-node:50051") as client:
        with client.session(keep="2GiB") as session:
            model = gradwire.torch.offload(model, session, wire_dtype="bfloat16")
            optimizer = gradwire.torch.optimizer(model, torch.optim.AdamW, lr=3e-4)

docs/training.md says when that is worth it.
"""

from __future__ import annotations

try:
    import torch as _torch  # noqa: F401 - to say what is missing
except ImportError as error:
    raise ImportError(
        "gradwire.torch needs PyTorch: pip install 'gradwire[torch]'"
    ) from error

from gradwire.torch._linear import Linear
from gradwire.torch._offload import (
    named_parameters,
    offload,
    remote_layers,
    to_local,
)
from gradwire.torch._optimizer import Optimizer, optimizer
from gradwire.torch._products import linear, matmul
from gradwire.torch._weight import Weight

__all__ = [
    "Linear",
    "Optimizer",
    "Weight",
    "linear",
    "matmul",
    "named_parameters",
    "offload",
    "optimizer",
    "remote_layers",
    "to_local",
]
