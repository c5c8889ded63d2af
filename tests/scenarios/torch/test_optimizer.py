"""`gradwire.torch.optimizer` is the optimizer of PyTorch, for weights anywhere."""

from __future__ import annotations

import copy
import io
import math
import pickle
import signal
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gradwire
import gradwire.torch
from tests.scenarios.torch.models import both, mse, regression

SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW

KINDS = [
    (SGD, {"lr": 0.1}),
    (SGD, {"lr": 0.1, "momentum": 0.9}),
    (ADAM, {"lr": 0.01}),
    (ADAMW, {"lr": 0.01, "weight_decay": 0.1}),
]
each_kind = pytest.mark.parametrize(
    ("kind", "options"), KINDS, ids=["sgd", "momentum", "adam", "adamw"]
)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 16))


def passes(models: Any, optimizers: Any, steps: int = 3, **options: Any) -> None:
    """Train several models alike."""
    for _ in range(steps):
        batch = regression()
        for model, opt in zip(models, optimizers, strict=True):
            mse(model, batch).backward()
            opt.step(**(options if isinstance(opt, gradwire.torch.Optimizer) else {}))
            opt.zero_grad()


def assert_same(local: nn.Module, remote: nn.Module) -> None:
    torch.testing.assert_close(remote.state_dict(), local.state_dict())


@each_kind
def test_states_are_exchanged_with_torchs_optimizer(
    client: gradwire.Client, session: gradwire.Session, kind: Any, options: Any
) -> None:
    local, remote = both(mlp(), session)
    optimizers = (
        kind(local.parameters(), **options),
        gradwire.torch.optimizer(remote, kind, **options),
    )
    passes((local, remote), optimizers)
    file = io.BytesIO()
    torch.save(optimizers[1].state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    expected = optimizers[0].state_dict()
    torch.testing.assert_close(state["state"], expected["state"])
    assert state["param_groups"] == expected["param_groups"]
    # Each goes on with the other's state, in a new process or session.
    with client.session(keep="1MiB") as another:
        here = mlp()
        here.load_state_dict(remote.state_dict())
        there = gradwire.torch.offload(mlp(), another, at_least=8)
        there.load_state_dict(local.state_dict())
        again = (
            kind(here.parameters(), lr=1.0),
            gradwire.torch.optimizer(there, kind, lr=1.0),
        )
        again[0].load_state_dict(state)
        again[1].load_state_dict(copy.deepcopy(expected))
        passes((local, remote, here, there), (*optimizers, *again))
        for model in (remote, here, there):
            assert_same(local, model)


@pytest.mark.parametrize("first", [0, 1, 2], ids=["sgd", "momentum", "adam"])
def test_another_optimizer_begins_without_states(
    session: gradwire.Session, first: int
) -> None:
    models = local, remote = both(mlp(), session)
    used = []
    for kind, options in (KINDS[first], KINDS[3], KINDS[0]):
        optimizers = (
            kind(local.parameters(), **options),
            gradwire.torch.optimizer(remote, kind, **options),
        )
        passes(models, optimizers)
        assert_same(local, remote)
        used.append(session.describe().used_bytes)
    assert used[1] > used[2]  # the states' memory is free
    opt = gradwire.torch.optimizer(remote, ADAM)
    passes([remote], [opt])
    weights = [each.weight for each in gradwire.torch.remote_layers(remote).values()]
    added = gradwire.torch.optimizer([nn.Parameter(torch.ones(1))], ADAM)
    added.add_param_group({"params": weights})
    assert not added.state_dict()["state"]


@pytest.mark.parametrize(("kind", "options"), KINDS[1:3], ids=["momentum", "adam"])
def test_loading_is_that_of_torch(
    session: gradwire.Session, kind: Any, options: Any
) -> None:
    models = local, remote = both(mlp(), session)
    optimizers = (
        kind(local.parameters(), **options),
        gradwire.torch.optimizer(remote, kind, **options),
    )
    new = mlp().state_dict()
    fresh = optimizers[0].state_dict()
    passes(models, optimizers)
    for model in models:  # the optimizer's states go on
        model.load_state_dict(new)
    passes(models, optimizers)
    assert_same(local, remote)
    for optimizer in optimizers:  # and begin anew
        optimizer.load_state_dict(copy.deepcopy(fresh))
    assert not optimizers[1].state_dict()["state"]
    passes(models, optimizers)
    assert_same(local, remote)


def test_groups_have_their_own_options(session: gradwire.Session) -> None:
    local, remote = both(mlp(), session)

    def groups(named: Any) -> list[dict[str, Any]]:
        parameters = [each for _, each in named]
        return [
            {"params": [p for p in parameters if p.ndim == 2], "weight_decay": 0.5},
            {"params": [p for p in parameters if p.ndim < 2], "lr": 0.001},
        ]

    optimizers = (
        ADAMW(groups(local.named_parameters()), lr=0.01),
        gradwire.torch.optimizer(
            groups(gradwire.torch.named_parameters(remote)), ADAMW, lr=0.01
        ),
    )
    passes((local, remote), optimizers, steps=5)
    assert_same(local, remote)


def test_a_group_can_be_added(session: gradwire.Session) -> None:
    local, remote = both(mlp(), session)
    first, _, second = remote
    opt = gradwire.torch.optimizer([first.weight, first.bias], ADAMW, lr=0.01)
    opt.add_param_group({"params": [second.weight, second.bias], "lr": 0.1})
    reference = ADAMW(local[0].parameters(), lr=0.01)
    reference.add_param_group({"params": list(local[2].parameters()), "lr": 0.1})
    passes((local, remote), (reference, opt), steps=5)
    assert_same(local, remote)
    with pytest.raises(gradwire.InputError, match="two groups"):
        opt.add_param_group({"params": [first.weight]})


def test_schedulers_set_the_rate_of_every_weight(session: gradwire.Session) -> None:
    local, remote = both(mlp(), session)
    optimizers = (
        SGD(local.parameters(), lr=0.1, momentum=0.9),
        gradwire.torch.optimizer(remote, SGD, lr=0.1, momentum=0.9),
    )
    schedulers = [
        torch.optim.lr_scheduler.OneCycleLR(each, max_lr=0.2, total_steps=8)
        for each in optimizers
    ]
    for _ in range(7):
        passes((local, remote), optimizers, steps=1)
        for scheduler in schedulers:
            scheduler.step()
    assert_same(local, remote)


def test_one_norm_clips_local_and_remote_gradients(session: gradwire.Session) -> None:
    local, remote = both(mlp(), session)
    opt = gradwire.torch.optimizer(remote, SGD, lr=1.0)
    reference = SGD(local.parameters(), lr=1.0)
    batch = regression()
    for model in (local, remote):
        (100 * mse(model, batch)).backward()
    norm = nn.utils.clip_grad_norm_(local.parameters(), 0.5)
    assert norm > 1
    reference.step()
    opt.step(max_norm=0.5)
    assert opt.total_norm == pytest.approx(norm.item(), rel=1e-5)
    assert_same(local, remote)


def test_zero_grad_forgets_what_no_step_has_used(session: gradwire.Session) -> None:
    local, remote = both(mlp(), session)
    optimizers = (
        SGD(local.parameters(), lr=0.1),
        gradwire.torch.optimizer(remote, SGD, lr=0.1),
    )
    batch = regression()
    for model, opt in zip((local, remote), optimizers, strict=True):
        mse(model, batch).backward()
        opt.zero_grad()
    passes((local, remote), optimizers)
    assert_same(local, remote)


def test_a_step_without_gradients_changes_nothing(session: gradwire.Session) -> None:
    _, remote = both(mlp(), session)
    opt = gradwire.torch.optimizer(remote, ADAMW, lr=0.1, weight_decay=0.1)
    before = copy.deepcopy(remote.state_dict())
    opt.step()
    torch.testing.assert_close(remote.state_dict(), before, rtol=0, atol=0)


def test_a_closure_is_called_with_gradients_enabled(session: gradwire.Session) -> None:
    local, remote = both(mlp(), session)
    batch = regression()
    losses = []
    for model, opt in (
        (local, SGD(local.parameters(), lr=0.1)),
        (remote, gradwire.torch.optimizer(remote, SGD, lr=0.1)),
    ):

        def closure(model: Any = model, opt: Any = opt) -> Any:
            opt.zero_grad()
            loss = mse(model, batch)
            loss.backward()
            return loss

        losses.append([opt.step(closure).item() for _ in range(3)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("steps", [6, pytest.param(100, marks=pytest.mark.big)])
@pytest.mark.parametrize("where", ["local", "remote"])
def test_a_loss_scaler_skips_what_overflows(
    session: gradwire.Session, where: str, steps: int
) -> None:
    local, remote = both(mlp(), session)
    optimizers: Any = (
        ADAMW(local.parameters(), lr=0.01),
        gradwire.torch.optimizer(remote, ADAMW, lr=0.01),
    )
    scalers = [
        torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2) for _ in "ab"
    ]
    for step in range(steps):
        batch = regression()
        overflows = step in {2, 30, 31, 97}
        if overflows:
            if where == "local":
                batch[1][0, 0] = math.inf
            else:
                batch[0][0, 0] = math.nan
        for model, opt, scaler in zip(
            (local, remote), optimizers, scalers, strict=True
        ):
            scaler.scale(mse(model, batch)).backward()
            if model is local:
                scaler.unscale_(opt)
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                scaler.step(opt)
            else:
                opt.step(max_norm=0.1, scaler=scaler)
                assert opt.skipped == overflows
            scaler.update()
            opt.zero_grad()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        assert_same(local, remote)
    weights, expected = (
        nn.utils.parameters_to_vector(model.state_dict().values())
        for model in (remote, local)
    )
    off = (weights - expected).norm() / expected.norm()
    print(f"{steps} steps: {off:.1e}")


def test_overflow_in_a_weights_gradient_alone_is_found(
    session: gradwire.Session,
) -> None:
    _, remote = both(mlp(), session)
    opt = gradwire.torch.optimizer(remote, SGD, lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    x = torch.randn(2, 16)
    x[0, 0] = math.inf
    # Its product with a gradient of 0 is NaN in dW alone.
    y = remote[0](x).nan_to_num() * 0 + remote[0].bias
    scaler.scale(remote[2](y.tanh()).sum()).backward()
    assert all(p.grad.isfinite().all() for p in remote.parameters())
    before = copy.deepcopy(remote.state_dict())
    opt.step(scaler=scaler)
    scaler.update()
    assert opt.skipped
    assert scaler.get_scale() == 32.0
    torch.testing.assert_close(remote.state_dict(), before, rtol=0, atol=0)


def test_gradients_that_are_unscaled_already_are_refused(
    session: gradwire.Session,
) -> None:
    local, remote = both(mlp(), session)
    opt = gradwire.torch.optimizer(remote, SGD, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(mse(remote, regression())).backward()
    scaler.unscale_(opt)
    before = copy.deepcopy(remote.state_dict())
    with pytest.raises(gradwire.InputError, match=r"unscale_\(opt\).*update\(\)"):
        opt.step(scaler=scaler)
    assert not session.step_count
    torch.testing.assert_close(remote.state_dict(), before, rtol=0, atol=0)
    opt.zero_grad()
    scaler.update()
    batch = regression()
    scaler.scale(mse(remote, batch)).backward()
    with pytest.raises(gradwire.InputError, match="scaler=scaler"):
        scaler.step(opt)
    opt.step(scaler=scaler)  # after a wrong call, the right one
    with pytest.raises(gradwire.InputError, match=r"update\(\)"):
        opt.step(scaler=scaler)
    mse(local, batch).backward()
    SGD(local.parameters(), lr=0.1).step()
    assert_same(local, remote)


def test_an_infinite_norm_is_no_limit(session: gradwire.Session) -> None:
    models = both(mlp(), session)
    optimizers = (
        SGD(models[0].parameters(), lr=0.1),
        gradwire.torch.optimizer(models[1], SGD, lr=0.1),
    )
    passes(models, optimizers, max_norm=math.inf)
    assert_same(*models)
    assert optimizers[1].total_norm > 0


def test_what_a_server_cannot_do_is_refused(
    client: gradwire.Client, session: gradwire.Session
) -> None:
    _, remote = both(mlp(), session)
    make = gradwire.torch.optimizer
    bad: list[tuple[str, Any]] = [
        ("amsgrad", lambda: make(remote, ADAM, amsgrad=True)),
        ("maximize", lambda: make(remote, SGD, lr=0.1, maximize=True)),
        ("Adagrad", lambda: make(remote, torch.optim.Adagrad)),
        ("parameters is a SGD", lambda: make(SGD(remote.parameters()), SGD)),
        ("closure is 1.0.*max_norm=", lambda: make(remote, SGD, lr=0.1).step(1.0)),
        *(
            ("max_norm", partial(make(remote, SGD, lr=0.1).step, max_norm=each))
            for each in (-1.0, 0, math.nan, "one")
        ),
    ]
    for text, call in bad:
        with pytest.raises(gradwire.InputError, match=text):
            call()
    with client.session(keep="1MiB") as another:
        other = gradwire.torch.offload(mlp(), another, at_least=8)
        with pytest.raises(gradwire.InputError, match="2 sessions"):
            make(nn.ModuleList([remote, other]), SGD, lr=0.1)
    weight = remote[0].weight
    for twice in ([weight, weight], [{"params": [weight]}, {"params": [weight]}]):
        with pytest.raises(gradwire.InputError, match="in two groups"):
            make(twice, SGD, lr=0.1)
    opt = make(remote, ADAMW, lr=0.1)
    state = ADAMW(mlp().parameters()).state_dict()
    wrong: list[tuple[str, Any]] = [
        ("no 'param_groups'|param_groups", mlp().state_dict()),
        ("no 'betas'.*torch.optim.AdamW", SGD(mlp().parameters()).state_dict()),
        (
            r"exp_avg of .*\(3,\): .*\(12, 16\)",
            {**state, "state": {0: {"exp_avg": torch.ones(3)}}},
        ),
        (
            "exp_avg of .* is a ndarray: expected a tensor",
            {**state, "state": {0: {"exp_avg": np.ones((12, 16))}}},
        ),
        ("the state is a NoneType", None),
    ]
    for text, given in wrong:
        with pytest.raises(gradwire.InputError, match=text):
            opt.load_state_dict(given)
    with pytest.raises(TypeError, match="state_dict"):
        pickle.dumps(opt)
    mse(remote, regression()).backward()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(1))
    for _ in range(2):
        with pytest.raises(gradwire.InputError, match="scaler=scaler"):
            scaler.step(opt)
    with pytest.raises(gradwire.InputError, match="scaler is a str"):
        opt.step(scaler="scaler")
    with pytest.raises(gradwire.InputError, match="groups of"):
        opt.load_state_dict({"state": {}, "param_groups": [{"params": [0]}]})


def test_an_optimizer_of_weights_that_are_local_again_says_what_to_do(
    session: gradwire.Session,
) -> None:
    _, remote = both(mlp(), session)
    opt = gradwire.torch.optimizer(remote, ADAM, lr=0.1)
    mse(remote, regression()).backward()
    opt.step()
    state = opt.state_dict()
    gradwire.torch.to_local(remote)
    ADAM(remote.parameters()).load_state_dict(state)
    for call in (opt.step, opt.state_dict, partial(opt.load_state_dict, state)):
        with pytest.raises(gradwire.ClientStateError, match=r"'0\.weight'.*to_local"):
            call()


@pytest.mark.parametrize("max_norm", [None, 0.01])
def test_an_embedding_may_have_sparse_gradients(
    session: gradwire.Session, max_norm: float | None
) -> None:
    model = nn.Sequential(nn.Embedding(9, 8, sparse=True), nn.Linear(8, 8))
    dense = copy.deepcopy(model)
    dense[0].sparse = False
    batch = torch.tensor([1, 1, 4]), torch.randn(3, 8)
    for each in (model, dense):
        gradwire.torch.offload(each, session, at_least=8)
        opt = gradwire.torch.optimizer(each, SGD, lr=0.1)
        mse(each, batch).backward()
        opt.step(max_norm=max_norm)
        opt.zero_grad()
        (mse(each, batch) * math.nan).backward()
        with pytest.raises(gradwire.InputError, match="2 of 2 local"):
            opt.step()
    assert_same(dense, model)


def test_a_model_without_remote_layers_trains_as_usual() -> None:
    model = mlp()
    reference = copy.deepcopy(model)
    passes(
        (model, reference),
        (
            gradwire.torch.optimizer(model, ADAMW, lr=0.01),
            ADAMW(reference.parameters(), lr=0.01),
        ),
    )
    assert_same(reference, model)


def test_optimizers_of_one_session_leave_each_others_gradients(
    session: gradwire.Session,
) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    local, remote = both(model, session)
    optimizers: Any = (
        [SGD(layer.parameters(), lr=0.1) for layer in local],
        [gradwire.torch.optimizer(layer, SGD, lr=0.1) for layer in remote],
    )
    for turn in range(4):
        batch = regression()
        for each, (first, second) in zip((local, remote), optimizers, strict=True):
            mse(each, batch).backward()
            first.step()
            first.zero_grad()
            if turn % 2:  # with the gradients of two passes
                second.step()
                second.zero_grad()
    assert_same(local, remote)


def test_local_gradients_with_nan_are_named_and_nothing_is_changed(
    session: gradwire.Session,
) -> None:
    _, remote = both(mlp(), session)
    opt = gradwire.torch.optimizer(remote, SGD, lr=0.1)
    before = copy.deepcopy(remote.state_dict())
    (mse(remote, regression()) * math.nan).backward()
    with pytest.raises(gradwire.InputError, match=r"2 of 2 local.*\(12,\), \(16,\)"):
        opt.step()
    torch.testing.assert_close(remote.state_dict(), before, rtol=0, atol=0)
    opt.zero_grad()
    mse(remote, regression()).backward()
    opt.step()
    assert all(each.isfinite().all() for each in remote.state_dict().values())


def interrupted_once(monkeypatch: Any, owner: Any, name: str, after: bool) -> None:
    """Have a method raise KeyboardInterrupt at its first call, before or after it."""
    method = getattr(owner, name)

    def call(*args: Any, **options: Any) -> Any:
        monkeypatch.undo()
        if after:
            method(*args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, call)


def with_ctrl_c(method: Any) -> Any:
    """Return what calls a method, and then sends the signal of Ctrl-C."""

    def call() -> None:
        method()
        signal.raise_signal(signal.SIGINT)

    return call


@pytest.mark.parametrize("where", ["before the server's", "after", "done", "drop"])
def test_an_interrupted_step_that_is_repeated_is_one_step(
    session: gradwire.Session, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    local, remote = both(mlp(), session)
    optimizers = ADAMW(local.parameters()), gradwire.torch.optimizer(remote, ADAMW)
    for number in range(3):
        batch = regression()
        for model in (local, remote):
            if model is remote:
                remote(batch[0]).sum()  # a graph without a backward pass
            mse(model, batch).backward()
        nn.utils.clip_grad_norm_(local.parameters(), 0.01)
        optimizers[0].step()
        if number == 1:
            owner, name = {
                "before the server's": (session, "step"),
                "after": (optimizers[1].local, "step"),
                "done": (optimizers[1].local, "step"),
                "drop": (session, "drop"),
            }[where]
            if where == "done":
                monkeypatch.setattr(owner, name, with_ctrl_c(getattr(owner, name)))
            else:
                interrupted_once(monkeypatch, owner, name, after=False)
            with pytest.raises(KeyboardInterrupt):
                optimizers[1].step(max_norm=0.01)
            monkeypatch.undo()
        optimizers[1].step(max_norm=0.01)
        for opt in optimizers:
            opt.zero_grad()
        assert session.step_count == number + 1
    assert_same(local, remote)


def test_a_step_after_new_passes_is_a_new_one(
    session: gradwire.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, remote = both(mlp(), session)
    opt = gradwire.torch.optimizer(remote, SGD, lr=0.1)
    mse(remote, regression()).backward()
    interrupted_once(monkeypatch, opt.local, "step", after=False)
    with pytest.raises(KeyboardInterrupt):
        opt.step()
    remote.zero_grad()  # does not tell the optimizer
    mse(remote, regression()).backward()
    opt.step()
    assert session.step_count == 2


@pytest.mark.parametrize("after", [False, True])
def test_gradients_whose_clearing_was_interrupted_are_cleared(
    session: gradwire.Session, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    _, remote = both(mlp(), session)
    opt = gradwire.torch.optimizer(remote, SGD, lr=0.1)
    mse(remote, regression()).backward()
    interrupted_once(monkeypatch, session, "clear", after=after)
    with pytest.raises(KeyboardInterrupt):
        opt.zero_grad()
    opt.zero_grad()
    for layer in gradwire.torch.remote_layers(remote).values():
        assert not layer.weight.fetch_gradient().any()


@pytest.mark.parametrize("kind", ["torch's", "of model.parameters()", "before offload"])
def test_an_optimizer_that_forgets_the_weights_on_the_server_is_noticed(
    session: gradwire.Session, kind: str
) -> None:
    other = gradwire.torch.offload(mlp(), session, at_least=8)
    opt: Any = gradwire.torch.optimizer(other, SGD, lr=0.1)
    passes([other], [opt])  # of another model in the session
    model = mlp()
    made_before = SGD(model.parameters(), lr=0.1)
    remote = gradwire.torch.offload(model, session, at_least=8)
    opt = made_before
    if kind == "torch's":
        opt = SGD(remote.parameters(), lr=0.1)
    elif kind == "of model.parameters()":
        opt = gradwire.torch.optimizer(remote.parameters(), SGD, lr=0.1)
    mse(remote, regression()).backward()
    SGD(mlp().parameters(), lr=0.1).step()  # no warning: of another model
    with pytest.warns(UserWarning, match=r"2 weights .*'[02]\.weight'.*optimizer\("):
        opt.step()
    opt.step()  # once
    right = gradwire.torch.optimizer(remote, SGD, lr=0.1)
    mse(remote, regression()).backward()
    right.step()


def test_steps_of_a_session_and_of_local_parameters_are_noticed_by_none(
    session: gradwire.Session,
) -> None:
    _, remote = both(mlp(), session)
    local = SGD(remote.parameters(), lr=0.1)
    weights = [each.weight for each in gradwire.torch.remote_layers(remote).values()]
    mse(remote, regression()).backward()
    session.step(gradwire.SGD(lr=0.1), {each.tensor: each.gradient for each in weights})
    local.step()
