"""A small GPT trains here and through a gradwire server, with the same losses.

.venv/bin/python examples/train_gpt.py [ADDRESS]

It learns the characters of Python's own documentation, which comes with Python. The
weights of its linear layers, their gradients and AdamW's state stay on the server;
attention, norms and embeddings stay here.
"""

from __future__ import annotations

import copy
import sys
import time
from pydoc_data.topics import topics
from typing import Any

from local_server import given_or_local_server

import gradwire

try:
    import torch
    from torch import nn

    import gradwire.torch
except ImportError:
    sys.exit("This example needs PyTorch: pip install 'gradwire[torch]'")

WIDTH, HEADS, LAYERS, LENGTH, BATCH, STEPS = 128, 4, 2, 64, 8, 41


class Block(nn.Module):
    """Causal attention and an MLP, each added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (batch, length, WIDTH) from the same shape."""
        heads = self.qkv(self.norm(x)).unflatten(2, (3, HEADS, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class Gpt(nn.Module):
    """A language model of characters."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(characters, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, characters)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits, shape (batch, length, characters)."""
        x = self.blocks(self.tokens(tokens) + self.positions)
        return self.head(self.norm(x))


def train_step(model: Gpt, optimizer: Any, batch: torch.Tensor) -> float:
    """Train on one batch; return the loss before the step."""
    logits = model(batch[:, :-1])
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    if isinstance(optimizer, gradwire.torch.Optimizer):
        optimizer.step(max_norm=1.0)
    else:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def main() -> None:
    """Train two copies of a model side by side."""
    server = given_or_local_server()
    torch.manual_seed(0)
    text = "".join(topics.values())
    characters = sorted(set(text))
    numbers = {character: number for number, character in enumerate(characters)}
    data = torch.tensor([numbers[character] for character in text])
    print(f"{len(data):,} characters, {len(characters)} different ones")

    local = Gpt(len(characters))
    remote = copy.deepcopy(local)
    with (
        server as address,
        gradwire.connect(address) as client,
        client.session(keep="64MiB") as session,
    ):
        gradwire.torch.offload(remote, session, at_least=WIDTH)
        layers = gradwire.torch.remote_layers(remote).values()
        there = sum(layer.weight.numel() for layer in layers)
        here = sum(parameter.numel() for parameter in remote.parameters())
        print(f"{there:,} parameters are on the server, {here:,} here")

        options = {"lr": 3e-3, "weight_decay": 0.1}
        runs = [
            (local, torch.optim.AdamW(local.parameters(), **options)),
            (remote, gradwire.torch.optimizer(remote, torch.optim.AdamW, **options)),
        ]
        schedulers = [
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
            for _, optimizer in runs
        ]
        seconds = [0.0, 0.0]
        largest = 0.0
        print("step   local      gradwire")
        for step in range(STEPS):
            starts = torch.randint(len(data) - LENGTH, (BATCH, 1))
            batch = data[starts + torch.arange(LENGTH + 1)]
            losses = []
            for index, (model, optimizer) in enumerate(runs):
                began = time.perf_counter()
                losses.append(train_step(model, optimizer, batch))
                seconds[index] += time.perf_counter() - began
                schedulers[index].step()
            largest = max(largest, abs(losses[0] - losses[1]))
            if step % 10 == 0 or step == STEPS - 1:
                print(f"{step:4d}   {losses[0]:.6f}   {losses[1]:.6f}")
        print(f"Largest difference between the losses: {largest:.1e}")
        here_ms, there_ms = (1e3 * each / STEPS for each in seconds)
        print(f"{here_ms:.0f} ms a step here, {there_ms:.0f} ms through the server")
        gradwire.torch.to_local(remote)  # before the session ends
    print(f"{sum(p.numel() for p in remote.parameters()):,} parameters are here again")


if __name__ == "__main__":
    main()
