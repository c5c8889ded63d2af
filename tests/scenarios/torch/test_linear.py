"""`gradwire.torch.Linear` behaves as `torch.nn.Linear`, or says why not."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

import gradwire
import gradwire.torch
from gradwire.torch import Linear
from tests.scenarios.torch.models import assert_same_weights
from tests.support.serving import BACKEND


def roles(session: gradwire.Session) -> list[str]:
    return [each.role for each in session.describe().tensors]


@pytest.fixture
def pair(session: gradwire.Session) -> tuple[nn.Linear, Linear]:
    """A local layer, and the same one in the session."""
    local = nn.Linear(6, 5)
    remote = gradwire.torch.offload(copy.deepcopy(local), session, at_least=1)
    assert isinstance(remote, Linear)
    return local, remote


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6), (0, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_results_and_gradients_are_torchs(
    session: gradwire.Session, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    local = nn.Linear(6, 5, dtype=dtype)
    remote = gradwire.torch.offload(copy.deepcopy(local), session, at_least=1)
    x = torch.randn(*shape, dtype=dtype)
    found = []
    for layer in (local, remote):
        rows = x.clone().requires_grad_()
        y = layer(rows)
        y.sin().sum().backward()
        found.append((y, rows.grad, layer.bias.grad))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(remote.weight.fetch_gradient(), local.weight.grad)


def test_it_is_made_as_torchs_layer_is(session: gradwire.Session) -> None:
    torch.manual_seed(1)
    local = nn.Linear(6, 5, False)
    torch.manual_seed(1)
    remote = Linear(6, 5, False, session=session)
    assert torch.equal(remote.weight.fetch(), local.weight)
    assert repr(remote) == "Linear(in_features=6, out_features=5, bias=False)"


def test_state_dicts_are_exchanged_with_torchs_layer(pair: Any) -> None:
    local, remote = pair
    file = io.BytesIO()
    torch.save(remote.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert list(state) == list(local.state_dict())
    torch.testing.assert_close(state, dict(local.state_dict()))
    other = nn.Linear(6, 5)
    other.load_state_dict(remote.state_dict())
    remote.load_state_dict(nn.Linear(6, 5).state_dict())
    assert not torch.equal(remote.weight.fetch(), local.weight)
    remote.load_state_dict(other.state_dict())
    assert torch.equal(remote.weight.fetch(), local.weight)
    x = torch.randn(2, 6)
    torch.testing.assert_close(remote(x), local(x))


def test_wrong_state_dicts_are_named_as_by_torchs_layer(pair: Any) -> None:
    local, remote = pair
    for state in (
        {"bias": torch.zeros(5)},
        {"weight": torch.zeros(6, 5), "bias": torch.zeros(5)},
        {"weight": torch.zeros(5, 6), "bias": torch.zeros(5), "more": torch.zeros(1)},
        {"weight": None, "bias": torch.zeros(5)},
    ):
        with pytest.raises(RuntimeError) as expected:
            local.load_state_dict(state)
        with pytest.raises(RuntimeError) as actual:
            remote.load_state_dict(state)
        assert str(actual.value) == str(expected.value)
    remote.load_state_dict({"bias": torch.zeros(5)}, strict=False)
    assert torch.equal(remote.weight.fetch(), local.weight)


def test_a_model_can_be_made_local_again(session: gradwire.Session) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 6))
    model[2].weight.requires_grad_(False)
    before = copy.deepcopy(model)
    seen: list[Any] = []
    handle = model[0].register_forward_hook(lambda *args: seen.append(args))
    remote = gradwire.torch.offload(model, session, at_least=5)
    assert remote is model
    assert list(gradwire.torch.remote_layers(model)) == ["0", "2"]
    assert gradwire.torch.to_local(model) is model
    assert [type(each) for each in model] == [nn.Linear, nn.ReLU, nn.Linear]
    torch.testing.assert_close(model.state_dict(), before.state_dict())
    assert [each.requires_grad for each in model.parameters()] == [
        True,
        True,
        False,
        True,
    ]
    assert roles(session) == []
    model(torch.randn(1, 6))
    handle.remove()
    model(torch.randn(1, 6))
    assert len(seen) == 1


def test_names_and_order_of_parameters_are_those_of_the_local_model(
    session: gradwire.Session,
) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 6, bias=False))
    expected = [(name, each.shape) for name, each in model.named_parameters()]
    gradwire.torch.offload(model, session, at_least=5)
    found = list(gradwire.torch.named_parameters(model))
    assert [(name, each.shape) for name, each in found] == expected
    assert [name for name, _ in model.named_parameters()] == [
        "0.bias",
        "1.weight",
        "1.bias",
    ]
    assert [name for name, each in found if each.ndim == 2] == ["0.weight", "2.weight"]


@pytest.mark.filterwarnings("ignore:a deep copy:UserWarning")
def test_a_layer_whose_parametrization_was_removed_keeps_its_order(
    session: gradwire.Session,
) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 6))
    nn.utils.parametrizations.weight_norm(model[0])
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    expected = [name for name, _ in model.named_parameters()]
    assert expected[0] == "0.bias"
    gradwire.torch.offload(model, session, at_least=5)
    assert [name for name, _ in gradwire.torch.named_parameters(model)] == expected
    for local in (copy.deepcopy(model), gradwire.torch.to_local(model)):
        assert [name for name, _ in local.named_parameters()] == expected


def test_what_is_not_a_plain_layer_stays_local(session: gradwire.Session) -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(
        Own(6, 6),
        nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),
        nn.utils.spectral_norm(nn.Linear(6, 6)),
        nn.Linear(6, 3),
        nn.MultiheadAttention(6, 2),
    )
    with pytest.warns(UserWarning, match="are of a subclass"):
        gradwire.torch.offload(model, session, at_least=4)
    assert gradwire.torch.remote_layers(model) == {}
    assert roles(session) == []


def test_a_session_that_is_full_leaves_the_model_as_it_was(
    client: gradwire.Client,
) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with client.session(keep=48 << 10) as session:
        with pytest.raises(gradwire.SessionFullError):
            gradwire.torch.offload(model, session, at_least=1)
        assert [type(each) for each in model] == [nn.Linear, nn.Linear]
        assert roles(session) == []


@pytest.mark.parametrize("how", ["no_grad", "inference", "eval"])
def test_passes_that_train_nothing_keep_nothing(pair: Any, how: str) -> None:
    local, remote = pair
    x = torch.randn(3, 6)
    if how == "eval":
        remote.eval()
        y = remote(x)
    else:
        with torch.no_grad() if how == "no_grad" else torch.inference_mode():
            y = remote(x)
    assert "activation" not in roles(remote.session)
    torch.testing.assert_close(y, local(x))
    if how == "eval":
        y.sin().sum().backward()
        local(x).sin().sum().backward()
        torch.testing.assert_close(remote.weight.fetch_gradient(), local.weight.grad)


def test_each_pass_through_a_retained_graph_contributes(pair: Any) -> None:
    x = torch.randn(3, 6)
    for layer in pair:
        loss = layer(x).sin().sum()
        for _ in range(3):
            loss.backward(retain_graph=True)
    local, remote = pair
    torch.testing.assert_close(remote.weight.fetch_gradient(), local.weight.grad)


def test_gradients_of_inputs_alone_leave_the_weights_gradient(pair: Any) -> None:
    x = torch.randn(3, 6, requires_grad=True)
    found = []
    for layer in pair:
        loss = layer(x).sin().sum()
        found.append(torch.autograd.grad(loss, x, retain_graph=True))
        loss.backward(inputs=[x], retain_graph=True)
        loss.backward(inputs=[layer.bias], retain_graph=True)
    torch.testing.assert_close(found[1], found[0])
    _, remote = pair
    assert not remote.weight.fetch_gradient().any()


@pytest.mark.parametrize(
    "upstream", [torch.sin, torch.clone], ids=["of the weight", "constant"]
)
def test_second_derivatives_are_refused(pair: Any, upstream: Any) -> None:
    _, remote = pair
    x = torch.randn(3, 6, requires_grad=True)
    (dx,) = torch.autograd.grad(upstream(remote(x)).sum(), x, create_graph=True)
    penalty = dx.square().sum() + remote(x).sum()
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        penalty.backward()


def test_a_gradient_with_a_graph_is_that_of_torch(pair: Any) -> None:
    x = torch.randn(3, 6, requires_grad=True)
    gradients = [
        torch.autograd.grad(layer(x).sin().sum(), x, create_graph=True)[0]
        for layer in pair
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, in jvp
def test_functional_transforms_are_refused(pair: Any) -> None:
    _, remote = pair
    x = torch.randn(3, 6)
    for transformed in (
        torch.func.grad(lambda x: remote(x).sum()),
        torch.func.vmap(remote),
        torch.func.jacrev(remote),
        lambda x: torch.func.jvp(remote, (x,), (x,)),
    ):
        with pytest.raises(NotImplementedError, match=r"torch\.func cannot transform"):
            transformed(x)


def test_an_input_changed_in_place_is_an_error_as_it_is_here(pair: Any) -> None:
    for layer in pair:
        x = torch.randn(3, 6)
        y = layer(x)
        x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_passes_without_a_backward_pass_take_no_memory_for_long(
    client: gradwire.Client,
) -> None:
    with client.session(keep="1MiB") as session:
        layer = Linear(64, 64, session=session)
        opt = gradwire.torch.optimizer(layer, torch.optim.SGD, lr=0.1)
        x = torch.randn(256, 64)
        for _ in range(40):
            layer(x)
        layer(x).sum().backward()
        gc.collect()  # what was dropped to make room is in a traceback's circle
        opt.step()
        assert "activation" not in roles(session)


def test_threads_may_share_a_layer(pair: Any) -> None:
    local, remote = pair
    batches = [torch.randn(4, 6) for _ in range(8)]

    def passes(x: torch.Tensor) -> None:
        remote(x).sin().sum().backward()

    threads = [threading.Thread(target=passes, args=(x,)) for x in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for x in batches:
        local(x).sin().sum().backward()
    torch.testing.assert_close(remote.weight.fetch_gradient(), local.weight.grad)


def test_workers_of_a_data_loader_may_be_forked(pair: Any) -> None:
    local, remote = pair
    data = torch.utils.data.TensorDataset(torch.randn(8, 6))
    for (x,) in torch.utils.data.DataLoader(data, batch_size=4, num_workers=1):
        remote(x).sum().backward()
        local(x).sum().backward()
    torch.testing.assert_close(remote.weight.fetch_gradient(), local.weight.grad)


def test_hooks_see_what_they_see_here(pair: Any) -> None:
    x = torch.randn(3, 6)
    for layer in pair:
        layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,))
        layer.register_forward_hook(lambda _, __, y: y + 1)
        layer.register_full_backward_hook(lambda _, dx, __: tuple(dx))
    local, remote = pair
    torch.testing.assert_close(remote(x), local(x))


def test_the_weight_says_where_its_elements_are(pair: Any) -> None:
    local, remote = pair
    weight = remote.weight
    assert (weight.shape, weight.ndim, weight.numel()) == (local.weight.shape, 2, 30)
    assert remote.gradient is weight.gradient
    with pytest.raises(AttributeError, match=r"session\.get\(layer\.gradient\)"):
        weight.grad  # noqa: B018
    with pytest.raises(AttributeError, match=r"layer\.weight\.fetch"):
        weight.data  # noqa: B018
    with pytest.raises(TypeError, match=r"layer\.weight\.fetch"):
        nn.functional.linear(torch.randn(2, 6), weight)
    uses: list[Any] = [
        lambda: weight + 1,
        lambda: 2 * weight,
        lambda: weight**2,
        lambda: torch.randn(2, 5) @ weight,
        lambda: weight @ torch.randn(6, 2),
        lambda: weight[0],
        lambda: len(weight),
        lambda: list(weight),
        lambda: weight > 0,
        lambda: np.asarray(weight),
    ]
    for use in uses:
        with pytest.raises(TypeError, match=r"layer\.weight\.fetch"):
            use()
    assert weight
    assert weight.requires_grad_(False) is weight
    assert not weight.requires_grad
    weight.requires_grad_()
    for value in (torch.zeros(5, 6), nn.Parameter(torch.zeros(5, 6))):
        with pytest.raises(AttributeError, match=r"layer\.weight\.put"):
            remote.weight = value
    with pytest.raises(gradwire.InputError, match="shape"):
        weight.put(torch.zeros(6, 5))
    weight.put(torch.ones(5, 6))
    assert torch.equal(weight.fetch(), torch.ones(5, 6))


def test_parameters_are_initialized_anew_as_torchs_are(pair: Any) -> None:
    for layer in pair:
        torch.manual_seed(3)
        layer.reset_parameters()
    assert_same_weights(*pair, rtol=0.0, atol=0.0)


def test_a_model_on_meta_is_refused(session: gradwire.Session) -> None:
    with pytest.raises(gradwire.InputError, match=r"'0\.weight' is on meta.*before"):
        gradwire.torch.offload(
            nn.Sequential(nn.Linear(8, 8, device="meta")), session, at_least=8
        )


def doubled(_: object, __: object, y: torch.Tensor) -> torch.Tensor:
    return 2 * y


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.filterwarnings("ignore:a deep copy:UserWarning")
@pytest.mark.parametrize(
    "copied",
    [
        pytest.param(copy.deepcopy, id="deepcopy"),
        *(
            pytest.param(lambda m, p=p: pickle.loads(pickle.dumps(m, p)), id=f"{p}")
            for p in range(pickle.HIGHEST_PROTOCOL + 1)
        ),
        pytest.param(saved, id="torch.save"),
    ],
)
def test_a_copy_is_the_local_model(session: gradwire.Session, copied: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6, False), nn.Linear(6, 5))
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    model[2].register_forward_hook(doubled)
    local = copy.deepcopy(model)
    gradwire.torch.offload(model, session, at_least=1)
    model(torch.randn(3, 6)).sum().backward()
    twin = copied(model)
    assert repr(twin) == repr(local)
    assert [vars(each).keys() for each in twin] == [vars(each).keys() for each in local]
    assert twin[0].weight is twin[1].weight
    torch.testing.assert_close(twin.state_dict(), local.state_dict(), rtol=0, atol=0)
    for one, other in zip(twin.parameters(), local.parameters(), strict=True):
        assert one.requires_grad == other.requires_grad
        assert one.grad is None
    x = torch.randn(3, 6)
    torch.testing.assert_close(twin(x), local(x))
    # The copy and the model go their own ways.
    with torch.no_grad():
        twin[0].weight.zero_()
    assert torch.equal(model[0].weight.fetch(), local[0].weight)


def test_a_pickled_layer_needs_no_gradwire(pair: Any) -> None:
    _, remote = pair
    remote.compile(backend="eager")  # makes a function that no pickle can hold
    assert b"gradwire" not in pickle.dumps(remote)


def put_weight(model: nn.Module, queue: Any) -> None:
    queue.put(model.weight.detach().numpy())


@pytest.mark.big  # imports PyTorch in another process
def test_a_model_can_be_sent_to_a_new_process(pair: Any) -> None:
    _, remote = pair
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=put_weight, args=(remote, queue))
    process.start()
    try:
        elements = queue.get(timeout=60)
    finally:
        process.kill()
        process.join()
    assert np.array_equal(elements, remote.weight.fetch().numpy())


@pytest.fixture(params=[1, 2])
def processes(request: pytest.FixtureRequest) -> Iterator[int]:
    """How many processes this one is of; PyTorch's fake ones exchange nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield request.param
    dist.destroy_process_group()


def test_data_parallelism_is_refused_where_weights_would_differ(
    pair: Any, processes: int
) -> None:
    layer = pair[1]
    model = DistributedDataParallel(nn.Sequential(nn.Linear(6, 6), layer))
    x = torch.randn(2, 6)
    if processes == 1:
        assert model(x).shape == (2, 5)
    else:
        with pytest.raises(gradwire.ClientStateError, match="does not average"):
            model(x)
    assert layer.weight.requires_grad_(False) is layer.weight
    assert model(x).shape == (2, 5)


def test_a_shallow_copy_shares_the_weight(pair: Any) -> None:
    _, remote = pair
    twin = copy.copy(remote)
    remote.weight.put(torch.zeros(5, 6))
    assert twin.weight is remote.weight
    assert twin.bias is remote.bias
    assert torch.equal(twin(torch.randn(3, 6)), remote.bias.expand(3, 5))


def test_an_average_by_parameters_is_warned_of(pair: Any) -> None:
    with pytest.warns(UserWarning, match=r"use state_dict\(\) of both"):
        torch.optim.swa_utils.AveragedModel(nn.Sequential(pair[1]))


def test_conversions_are_refused(pair: Any) -> None:
    with pytest.raises(gradwire.InputError, match="before offload"):
        nn.Sequential(pair[1]).half()


def test_bad_arguments_are_named(session: gradwire.Session, pair: Any) -> None:
    _, remote = pair
    x = torch.randn(2, 6)
    bad: list[tuple[str, Any]] = [
        (r"\(2, 5\).*\(\.\.\., 6\)", lambda: remote(x[:, :5])),
        ("one dtype", lambda: remote(x.double())),
        ("x is a ndarray", lambda: remote(x.numpy())),
        ("on meta", lambda: remote(x.to("meta"))),
        ("session is a str", lambda: Linear(6, 5, session="session")),
        ("wire_dtype", lambda: Linear(6, 5, session=session, wire_dtype="int8")),
        (
            "one copy",
            lambda: Linear(
                6, 5, session=session, wire_dtype="float16", compute_dtype="bfloat16"
            ),
        ),
        (
            "float64",
            lambda: Linear(
                6, 5, session=session, wire_dtype="float16", dtype=torch.float64
            ),
        ),
        ("at_least", lambda: gradwire.torch.offload(remote, session, at_least=1.5)),
    ]
    for text, call in bad:
        with pytest.raises(gradwire.InputError, match=text):
            call()


def test_a_frozen_layer_can_be_thawed(pair: Any) -> None:
    local, remote = pair
    x = torch.randn(3, 6)
    remote.requires_grad_(False)
    assert not remote(x).requires_grad
    remote.requires_grad_(True)
    remote(x).sin().sum().backward()
    local(x).sin().sum().backward()
    torch.testing.assert_close(remote.weight.fetch_gradient(), local.weight.grad)
    remote.zero_grad()
    assert not remote.weight.fetch_gradient().any()


def test_a_model_of_which_nothing_moves_says_why(session: gradwire.Session) -> None:
    class Own(nn.Linear):
        pass

    models: list[tuple[str, nn.Module]] = [
        ("at_least is 8, and .* is 4 x 16$", nn.Linear(4, 16)),
        ("no torch.nn.Linear", nn.Conv2d(3, 3, 3)),
        ("subclass", Own(16, 16)),
    ]
    for text, model in models:
        with pytest.warns(UserWarning, match=text) as caught:
            assert gradwire.torch.offload(model, session, at_least=8) is model
        assert caught[0].filename == __file__
    moved = gradwire.torch.offload(nn.Linear(16, 16), session, at_least=8)
    gradwire.torch.offload(moved, session, at_least=8)  # no warning: it is there


def test_a_model_and_a_session_are_told_apart(
    client: gradwire.Client, session: gradwire.Session
) -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(gradwire.InputError, match="model is a Session"):
        gradwire.torch.offload(session, model)
    with pytest.raises(gradwire.InputError, match="model is a Session"):
        gradwire.torch.to_local(session)
    with pytest.raises(gradwire.InputError, match="session is a Client"):
        gradwire.torch.offload(model, client)


def test_workers_send_a_frozen_layer_once(client: gradwire.Client) -> None:
    local = nn.Linear(512, 512).requires_grad_(False)
    x = torch.randn(3, 512)
    with client.session("8MiB") as one, client.session("8MiB") as other:
        layers = [
            gradwire.torch.offload(copy.deepcopy(local), session)
            for session in (one, other)
        ]
        for session, layer in zip((one, other), layers, strict=True):
            (info,) = session.describe().tensors
            assert info.frozen
            assert info.sharers == (2 if BACKEND == "numpy" else 1)
            torch.testing.assert_close(layer(x), local(x))
            layer.load_state_dict(local.state_dict())
        # One is trained from here on, and the other one is not.
        layers[0].requires_grad_(True)
        optimizer = gradwire.torch.optimizer(layers[0], torch.optim.SGD, lr=1.0)
        layers[0](x).sum().backward()
        optimizer.step()
        torch.testing.assert_close(layers[1].weight.fetch(), local.weight)
        changed = layers[0].weight.fetch() - local.weight
        torch.testing.assert_close(changed, -x.sum(0).expand(512, 512))
