"""What is done to the local parameters alone is noticed."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import gradwire
import gradwire.torch
from tests.scenarios.torch.models import mse, regression


@pytest.fixture(name="model")
def _model(session: gradwire.Session) -> Any:
    model = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 16))
    return gradwire.torch.offload(model, session, at_least=8)


@pytest.fixture(name="opt")
def _opt(model: Any) -> Any:
    return gradwire.torch.optimizer(model, torch.optim.SGD, lr=0.1)


@pytest.mark.parametrize(
    "clip", [nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_], ids=["norm", "value"]
)
def test_clipping_of_local_gradients_is_noticed(
    model: Any, opt: Any, clip: Any
) -> None:
    for _ in range(2):  # without, nothing is said
        mse(model, regression()).backward()
        opt.step(max_norm=0.1)
        opt.step()
        opt.zero_grad(set_to_none=False)
        opt.step()
    mse(model, regression()).backward()
    clip(model.parameters(), 1.0)
    with pytest.warns(UserWarning, match=r"opt\.step\(max_norm") as caught:
        opt.step()
    assert caught[0].filename == __file__


def test_a_gradient_that_is_masked_is_not_taken_for_clipping(
    model: Any, opt: Any
) -> None:
    mse(model, regression()).backward()
    model[0].bias.grad[0] = 0
    opt.step()


def test_clipping_beside_frozen_weights_is_as_meant(model: Any, opt: Any) -> None:
    for layer in gradwire.torch.remote_layers(model).values():
        layer.weight.requires_grad = False
    mse(model, regression()).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    opt.step()


def test_emptying_of_local_gradients_is_noticed(model: Any, opt: Any) -> None:
    for _ in range(2):  # accumulated
        mse(model, regression()).backward()
    model.zero_grad()
    with pytest.warns(UserWarning, match=r"opt\.zero_grad\(\)"):
        mse(model, regression()).backward()
    opt.step()
    model.zero_grad()  # after a step there is nothing on the server
    mse(model, regression()).backward()
    opt.zero_grad()
    mse(model, regression()).backward()


@pytest.mark.parametrize("thaw", [False, True])
def test_freezing_of_local_parameters_is_noticed(model: Any, thaw: bool) -> None:
    for layer in gradwire.torch.remote_layers(model).values():
        layer.requires_grad_(not thaw)
    model(torch.randn(2, 16))
    model.requires_grad_(thaw)
    with torch.no_grad():
        model(torch.randn(2, 16))  # nothing is trained
    text = "a bias was thawed" if thaw else "a bias was frozen"
    with pytest.warns(UserWarning, match=rf"{text}.*requires_grad_\({thaw}\)"):
        model(torch.randn(2, 16))
    model(torch.randn(2, 16))  # once


def test_freezing_of_layers_or_weights_is_as_meant(model: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value in (False, True):
            model[0].requires_grad_(value)
            model(torch.randn(2, 16))
        model[0].weight.requires_grad = False  # biases alone are trained
        model(torch.randn(2, 16)).sum().backward()
