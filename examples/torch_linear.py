"""A PyTorch layer with its products computed by a gradwire server.

.venv/bin/python examples/torch_linear.py [ADDRESS]

The forward pass computes Y on the server. The backward pass computes dX and dW, as
far as autograd needs them. Everything else is PyTorch: optimizers, other layers,
higher-level modules.
"""

from __future__ import annotations

import sys
from typing import Any

from local_server import given_or_local_server

import gradwire

try:
    import torch
except ImportError:
    sys.exit("This example needs PyTorch: pip install torch")


class RemoteProduct(torch.autograd.Function):
    """Y = X W on a server; X may have any leading dimensions."""

    @staticmethod
    def forward(
        ctx: Any, client: gradwire.Client, x: torch.Tensor, w: torch.Tensor
    ) -> torch.Tensor:
        """Y, shape (..., k)."""
        ctx.client = client
        ctx.save_for_backward(x, w)
        y: torch.Tensor = client.forward(x, w)  # autograd is off here
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable  # a second derivative is an error
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """None for the client; dX and dW if needed."""
        x, w = ctx.saved_tensors
        _, needs_dx, needs_dw = ctx.needs_input_grad
        wanted = ["dx"] * needs_dx + ["dw"] * needs_dw
        _, dx, dw = ctx.client.gradients(x, w, dy, results=wanted)
        return None, dx, dw


class RemoteLinear(torch.nn.Module):
    """`torch.nn.Linear` with its products on a server."""

    def __init__(self, client: gradwire.Client, inputs: int, outputs: int) -> None:
        super().__init__()
        self.client = client
        self.weight = torch.nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = torch.nn.Parameter(torch.zeros(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (..., outputs) from (..., inputs)."""
        y: torch.Tensor = RemoteProduct.apply(self.client, x, self.weight)
        return y + self.bias


def main() -> None:
    """Compare gradients with PyTorch's, then train briefly."""
    torch.manual_seed(0)
    x, target = torch.randn(64, 20), torch.randn(64, 1)
    with given_or_local_server() as address, gradwire.connect(address) as client:
        first, second = RemoteLinear(client, 20, 30), RemoteLinear(client, 30, 1)
        model = torch.nn.Sequential(first, torch.nn.Tanh(), second)

        mse = torch.nn.functional.mse_loss
        mse(model(x), target).backward()
        hidden = torch.tanh(x @ first.weight + first.bias)
        local = torch.nn.functional.mse_loss(
            hidden @ second.weight + second.bias, target
        )
        (expected,) = torch.autograd.grad(local, first.weight)
        difference = (first.weight.grad - expected).abs().max().item()
        print(f"Largest difference from PyTorch's gradient: {difference:.1e}")

        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for step in range(101):
            optimizer.zero_grad()
            loss = mse(model(x), target)
            loss.backward()
            optimizer.step()
            if step % 50 == 0:
                print(f"step {step:3d}: loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
