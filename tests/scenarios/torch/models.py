"""Small models, and the same training here and through a session."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import gradwire
import gradwire.torch

VOCABULARY, LENGTH, WIDTH = 23, 8, 32


class Block(nn.Module):
    """A block of a transformer: causal attention and an MLP, as in GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, length, width = x.shape
        heads = self.qkv(self.norms[0](x)).view(rows, length, 3, 2, width // 2)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
        return x + self.mlp(self.norms[1](x))


class Gpt(nn.Module):
    """A small language model; with `tied`, embedding and head share a weight."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def text() -> torch.Tensor:
    """A batch of tokens with LENGTH + 1 columns: inputs and targets."""
    return torch.randint(VOCABULARY, (4, LENGTH + 1))


def gpt_loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(tokens[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def regression() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(6, 16), torch.randn(6, 16)


def mse(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def both(
    model: nn.Module, session: gradwire.Session, **options: Any
) -> tuple[nn.Module, nn.Module]:
    """The model here, and a copy of it with its layers offloaded."""
    remote = copy.deepcopy(model)
    options.setdefault("at_least", 8)
    return model, gradwire.torch.offload(remote, session, **options)


def train(
    model: nn.Module,
    kind: Any,
    batches: list[Any],
    loss_of: Callable[[nn.Module, Any], torch.Tensor],
    *,
    max_norm: float | None = None,
    accumulate: int = 1,
    **options: Any,
) -> tuple[list[float], list[float]]:
    """Train; return the losses and the norms of the gradients."""
    remote = gradwire.torch.remote_layers(model)
    optimizer: Any
    if remote:
        optimizer = gradwire.torch.optimizer(model, kind, **options)
    else:
        optimizer = kind(model.parameters(), **options)
    losses, norms = [], []
    for index, batch in enumerate(batches):
        loss = loss_of(model, batch)
        loss.backward()
        losses.append(loss.item())
        if (index + 1) % accumulate:
            continue
        if remote:
            optimizer.step(max_norm=max_norm)
            norms.append(optimizer.total_norm)
        else:
            norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm or 1e30)
            norms.append(norm.item())
            optimizer.step()
        optimizer.zero_grad()
    return losses, norms


def assert_same_weights(local: nn.Module, remote: nn.Module, **close: float) -> None:
    torch.testing.assert_close(remote.state_dict(), local.state_dict(), **close)
