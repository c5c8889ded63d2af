"""A model trains through a session as it does here."""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from torch import nn

import gradwire
import gradwire.torch
from tests.scenarios.torch.models import (
    LENGTH,
    VOCABULARY,
    Gpt,
    assert_same_weights,
    both,
    gpt_loss,
    mse,
    regression,
    text,
    train,
)

SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW


def close(one: Any, other: Any, atol: float = 1e-5) -> None:
    """Compare losses of about 3, whose sums are in another order."""
    torch.testing.assert_close(
        torch.tensor(one), torch.tensor(other), rtol=0, atol=atol
    )


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (ADAMW, {"lr": 3e-3, "weight_decay": 0.1, "max_norm": 0.5}),
        pytest.param(
            ADAM,
            {"lr": 3e-3, "betas": (0.8, 0.95), "weight_decay": 0.01},
            marks=pytest.mark.big,
        ),
        (SGD, {"lr": 0.3, "momentum": 0.9, "nesterov": True, "max_norm": 0.5}),
        pytest.param(
            SGD,
            {"lr": 0.3, "weight_decay": 0.01, "accumulate": 3},
            marks=pytest.mark.big,
        ),
    ],
    ids=["adamw-clipped", "adam", "sgd-momentum-clipped", "sgd-accumulated"],
)
def test_fifteen_steps_of_a_gpt_are_torchs(
    session: gradwire.Session, kind: Any, options: dict[str, Any]
) -> None:
    local, remote = both(Gpt(), session)
    assert len(gradwire.torch.remote_layers(remote)) == 9
    batches = [text() for _ in range(15)]
    losses, norms = train(local, kind, batches, gpt_loss, **options)
    remote_losses, remote_norms = train(remote, kind, batches, gpt_loss, **options)
    close(remote_losses, losses)
    close(remote_norms, norms)
    assert losses[-1] != losses[0]


@pytest.mark.big
def test_two_hundred_steps_of_a_gpt_on_real_text_have_torchs_losses(
    session: gradwire.Session,
) -> None:
    data = torch.tensor([ord(each) % VOCABULARY for each in "".join(topics.values())])
    starts = torch.randint(len(data) - LENGTH, (200, 16, 1))
    batches = list(data[starts + torch.arange(LENGTH + 1)])
    local, remote = both(Gpt(), session)
    options = {"lr": 3e-3, "weight_decay": 0.1, "max_norm": 1.0}
    losses, _ = train(local, ADAMW, batches, gpt_loss, **options)
    remote_losses, _ = train(remote, ADAMW, batches, gpt_loss, **options)
    assert losses[-1] < losses[0] - 0.5
    difference = (torch.tensor(losses) - torch.tensor(remote_losses)).abs().max()
    print(f"largest difference between losses: {difference:.1e}")
    close(remote_losses, losses)


@pytest.mark.parametrize(
    "dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.big)]
)
def test_rounded_rows_train_nearly_as_well(
    session: gradwire.Session, dtype: str
) -> None:
    local, remote = both(Gpt(), session, wire_dtype=dtype)
    batches = [text()] * 20
    losses, _ = train(local, ADAMW, batches, gpt_loss, lr=3e-3)
    rounded, _ = train(remote, ADAMW, batches, gpt_loss, lr=3e-3)
    assert losses[-1] < losses[0] / 2
    close(rounded, losses, atol=0.02)
    assert rounded != losses


def test_a_head_tied_to_an_embedding_stays_local(session: gradwire.Session) -> None:
    local, remote = both(Gpt(tied=True), session)
    assert type(remote.head) is nn.Linear
    assert len(gradwire.torch.remote_layers(remote)) == 8
    batches = [text() for _ in range(5)]
    losses = train(local, ADAMW, batches, gpt_loss, lr=3e-3)
    for one, other in zip(
        train(remote, ADAMW, batches, gpt_loss, lr=3e-3), losses, strict=True
    ):
        close(one, other)


class Tied(nn.Module):
    """One layer used three times, and another one with its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(16, 16)
        self.again = self.one
        self.other = nn.Linear(16, 16)
        self.other.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.again(self.one(x).tanh()).tanh()
        return self.other(self.one(x).tanh())


def test_tied_weights_are_one_tensor_whose_contributions_add_up(
    session: gradwire.Session,
) -> None:
    local, remote = both(Tied(), session)
    assert remote.one is remote.again
    assert remote.one.weight is remote.other.weight
    assert remote.one.bias is not remote.other.bias
    weights = [each for each in session.describe().tensors if each.role == "weight"]
    assert len(weights) == 1
    batch = regression()
    for model in (local, remote):
        mse(model, batch).backward()
    torch.testing.assert_close(
        remote.one.weight.fetch_gradient(), local.one.weight.grad
    )
    state = remote.state_dict()
    assert state["one.weight"] is state["other.weight"]
    remote.other.weight.zero_grad()
    batches = [regression() for _ in range(10)]
    local.zero_grad()
    remote.zero_grad()
    options = {"lr": 0.1, "momentum": 0.9, "max_norm": 0.1}
    losses = train(local, SGD, batches, mse, **options)
    for one, other in zip(
        train(remote, SGD, batches, mse, **options), losses, strict=True
    ):
        close(one, other)
    assert_same_weights(local, remote)


def test_a_frozen_weight_has_no_gradient_and_keeps_nothing(
    session: gradwire.Session,
) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    model[2].weight.requires_grad_(False)
    local, remote = both(model, session)
    frozen = remote[2]
    assert frozen.gradient is None
    assert "frozen" in repr(frozen)
    batch = regression()
    loss = mse(remote, batch)
    kept = [each for each in session.describe().tensors if each.role == "activation"]
    assert len(kept) == 1
    loss.backward()
    mse(local, batch).backward()
    torch.testing.assert_close(remote[2].bias.grad, local[2].bias.grad)
    torch.testing.assert_close(remote[0].weight.fetch_gradient(), local[0].weight.grad)
    before = frozen.weight.fetch()
    batches = [regression() for _ in range(5)]
    remote[0].zero_grad()
    local.zero_grad()
    remote.zero_grad()
    losses = train(local, ADAMW, batches, mse, lr=0.1)
    for one, other in zip(
        train(remote, ADAMW, batches, mse, lr=0.1), losses, strict=True
    ):
        close(one, other)
    assert torch.equal(frozen.weight.fetch(), before)


class Lora(nn.Module):
    """A frozen layer with a small trained correction."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Linear(base.in_features, rank, bias=False)
        self.b = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.b(self.a(x))


def test_adapters_stay_local_beside_frozen_layers(session: gradwire.Session) -> None:
    local, remote = both(
        nn.Sequential(Lora(nn.Linear(16, 16)), nn.Tanh(), Lora(nn.Linear(16, 16))),
        session,
    )
    assert list(gradwire.torch.remote_layers(remote)) == ["0.base", "2.base"]
    assert {each.role for each in session.describe().tensors} == {"weight"}
    batches = [regression() for _ in range(10)]
    losses = train(local, ADAMW, batches, mse, lr=0.01, max_norm=1.0)
    for one, other in zip(
        train(remote, ADAMW, batches, mse, lr=0.01, max_norm=1.0), losses, strict=True
    ):
        close(one, other)
    assert_same_weights(local, remote)


@pytest.mark.parametrize(
    "reentrant", [False, pytest.param(True, marks=pytest.mark.big)]
)
def test_checkpointed_activations_give_the_same_gradients(
    session: gradwire.Session, reentrant: bool
) -> None:
    class Checkpointed(Gpt):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.tokens(tokens) + self.positions
            for block in self.blocks:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)
            return self.head(x)

    local, remote = both(Checkpointed(), session)
    batches = [text() for _ in range(5)]
    losses = train(local, ADAMW, batches, gpt_loss, lr=3e-3, max_norm=0.5)
    for one, other in zip(
        train(remote, ADAMW, batches, gpt_loss, lr=3e-3, max_norm=0.5),
        losses,
        strict=True,
    ):
        close(one, other)
    assert all(each.role != "activation" for each in session.describe().tensors)


@pytest.mark.parametrize("compute_dtype", [None, "bfloat16"])
def test_autocast_trains_nearly_as_here(
    session: gradwire.Session, compute_dtype: str | None
) -> None:
    local, remote = both(Gpt(), session, compute_dtype=compute_dtype)

    def loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return gpt_loss(model, tokens)

    batches = [text() for _ in range(10)]
    losses, _ = train(local, ADAMW, batches, loss, lr=1e-3)
    others, _ = train(remote, ADAMW, batches, loss, lr=1e-3)
    close(others, losses, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert remote.head(torch.randn(2, 32)).dtype is torch.bfloat16


def test_a_bfloat16_model_keeps_float32_weights_on_the_server(
    session: gradwire.Session,
) -> None:
    model = nn.Linear(16, 16).bfloat16()
    remote = gradwire.torch.offload(model, session, at_least=8)
    (weight,) = (each for each in session.describe().tensors if each.role == "weight")
    assert (weight.dtype, weight.compute_dtype) == ("float32", "bfloat16")
    x = torch.randn(4, 16).bfloat16().requires_grad_()
    expected = nn.functional.linear(x, model.weight)
    y = remote(x) - remote.bias
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0, atol=0.05)
    y.sum().backward()
    assert x.grad.dtype is torch.bfloat16
    opt = gradwire.torch.optimizer(remote, SGD, lr=1e-4)
    before = session.get(remote.weight.tensor)
    opt.step()
    # Smaller than bfloat16 can hold, and not lost.
    assert (session.get(remote.weight.tensor) != before).all()
    assert remote.state_dict()["weight"].dtype is torch.bfloat16


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_transformer_layers_of_torch_work(session: gradwire.Session, mode: str) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    local, remote = both(getattr(layer, mode)(), session)
    assert sorted(gradwire.torch.remote_layers(remote)) == ["linear1", "linear2"]
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(remote(x), local(x))
    with torch.no_grad():
        torch.testing.assert_close(remote(x), local(x))
