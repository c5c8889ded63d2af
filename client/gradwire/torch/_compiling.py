"""What `torch.compile` leaves alone."""

from __future__ import annotations

import torch

uncompiled = getattr(torch, "_disable_dynamo", torch.compiler.disable)
"""Does what `torch.compiler.disable` does, with the first call.

The latter imports the compiler where a function is defined, which takes a second.
PyTorch's own optimizers use the former.
"""
