"""Optimizers: their options travel whole, and invalid values are named."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwire_protocol.optimizers import (
    OPTIMIZERS,
    STATES,
    Adam,
    OptimizerError,
    Sgd,
    check_optimizer,
)
from gradwire_protocol.v1 import session_service_pb2

NUMBERS = st.floats(allow_nan=False)


def option_names(optimizer: Any) -> list[str]:
    return [option.name for option in dataclasses.fields(optimizer)]


def test_every_optimizer_of_the_contract_is_known_with_all_its_options():
    group = session_service_pb2.ParameterGroup.DESCRIPTOR
    members = group.oneofs_by_name["optimizer"].fields
    assert {member.name for member in members} == set(OPTIMIZERS)
    for member in members:
        names = [field.name for field in member.message_type.fields]
        assert option_names(OPTIMIZERS[member.name]) == names


@given(st.builds(Sgd, NUMBERS, NUMBERS, NUMBERS, NUMBERS, st.booleans()))
def test_options_of_sgd_that_are_written_are_read_again(optimizer):
    message = session_service_pb2.Sgd.FromString(
        optimizer.to_message().SerializeToString()
    )
    assert Sgd.from_message(message) == optimizer


@given(st.builds(Adam, NUMBERS, NUMBERS, NUMBERS, NUMBERS, NUMBERS, st.booleans()))
def test_options_of_adam_that_are_written_are_read_again(optimizer):
    message = session_service_pb2.Adam.FromString(
        optimizer.to_message().SerializeToString()
    )
    assert Adam.from_message(message) == optimizer


@pytest.mark.parametrize("number", [np.float32(0.25), np.float64(0.25), Fraction(1, 4)])
def test_a_rate_may_be_any_kind_of_number(number):
    for optimizer in (Sgd(number), Adam(number)):
        check_optimizer(optimizer)
        assert optimizer.to_message().lr == 0.25


def test_options_are_torchs_by_default():
    torch = pytest.importorskip("torch")
    weight = torch.nn.Parameter(torch.ones(1))
    sgd = torch.optim.SGD([weight], 0.1).defaults
    adam = torch.optim.Adam([weight], 0.1).defaults
    given_sgd = dataclasses.asdict(Sgd(0.1))
    assert given_sgd == {name: sgd[name] for name in given_sgd}
    given_adam = dataclasses.asdict(Adam(0.1))
    assert (given_adam.pop("beta1"), given_adam.pop("beta2")) == adam["betas"]
    assert not given_adam.pop("decoupled")
    assert given_adam == {name: adam[name] for name in given_adam}


def test_states_have_torchs_names():
    torch = pytest.importorskip("torch")
    for optimizer, theirs in (
        (Sgd(0.1), lambda w: torch.optim.SGD([w], 0.1)),
        (Sgd(0.1, 0.9), lambda w: torch.optim.SGD([w], 0.1, 0.9)),
        (Adam(0.1), lambda w: torch.optim.Adam([w], 0.1)),
        (Adam(0.1, decoupled=True), lambda w: torch.optim.AdamW([w], 0.1)),
    ):
        weight = torch.nn.Parameter(torch.ones(3))
        weight.grad = torch.ones(3)
        steps = theirs(weight)
        steps.step()
        names = [
            name
            for name, value in steps.state[weight].items()
            if value is not None and name != "step"
        ]
        assert list(optimizer.states) == names


def test_all_states_are_listed():
    assert Sgd(0.1).states == ()
    assert Sgd(0.1, 0.9).states == ("momentum_buffer",)
    assert Adam(0.1).states == ("exp_avg", "exp_avg_sq")
    assert (*Sgd(0.1, 0.9).states, *Adam(0.1).states) == STATES


@pytest.mark.parametrize(
    "optimizer",
    [
        Sgd(0.0),
        Sgd(1, momentum=2, dampening=-1, weight_decay=3),
        Sgd(1e300, momentum=0.9, nesterov=True),
        Adam(0.0, 0.0, 0.0, 0.0, 0.0),
        Adam(1e-3, math.nextafter(1, 0), math.nextafter(1, 0), 1.0, 1.0, True),
    ],
)
def test_valid_values_are_accepted(optimizer):
    check_optimizer(optimizer)


NOT_NEGATIVE = "expected a finite number, at least 0"
BELOW_1 = "expected at least 0 and less than 1"

OUT_OF_RANGE = [
    (Sgd(-0.1), f"lr is -0.1: {NOT_NEGATIVE}"),
    (Sgd(0.1, momentum=-0.5), f"momentum is -0.5: {NOT_NEGATIVE}"),
    (Sgd(0.1, weight_decay=-1), f"weight_decay is -1: {NOT_NEGATIVE}"),
    (Sgd(0.1, nesterov=True), "momentum is 0.0: expected more than 0 with nesterov"),
    (
        Sgd(0.1, 0.9, 0.5, nesterov=True),
        "dampening is 0.5: expected 0 with nesterov",
    ),
    (Adam(-1.0), f"lr is -1.0: {NOT_NEGATIVE}"),
    (Adam(0.1, beta1=1.0), f"beta1 is 1.0: {BELOW_1}"),
    (Adam(0.1, beta1=-0.1), f"beta1 is -0.1: {BELOW_1}"),
    (Adam(0.1, beta2=1.5), f"beta2 is 1.5: {BELOW_1}"),
    (Adam(0.1, beta2=-0.1), f"beta2 is -0.1: {BELOW_1}"),
    (Adam(0.1, eps=-1e-8), f"eps is -1e-08: {NOT_NEGATIVE}"),
    (Adam(0.1, weight_decay=-1.0), f"weight_decay is -1.0: {NOT_NEGATIVE}"),
]


@pytest.mark.parametrize(("optimizer", "says"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_named_with_what_is_expected(optimizer, says):
    with pytest.raises(OptimizerError) as refused:
        check_optimizer(optimizer)
    assert str(refused.value) == says
    assert refused.value.field == says.split()[0]


@pytest.mark.parametrize(("optimizer", "says"), OUT_OF_RANGE)
def test_what_is_out_of_range_here_is_out_of_range_in_torch(optimizer, says):
    torch = pytest.importorskip("torch")
    options = dataclasses.asdict(optimizer)
    if isinstance(optimizer, Adam):
        options["betas"] = options.pop("beta1"), options.pop("beta2")
        del options["decoupled"]
    make = torch.optim.Adam if isinstance(optimizer, Adam) else torch.optim.SGD
    with pytest.raises(ValueError, match=r"Invalid|Nesterov"):
        make([torch.nn.Parameter(torch.ones(1))], **options)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (math.nan, "nan"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (10**400, "1" + 59 * "0"),
        (np.float32(np.nan), "nan"),
        ("0.1", "'0.1'"),
        (None, "None"),
        (True, "True"),
        (1j, "1j"),
        ([0.1] * 100, repr([0.1] * 100)[:60]),
    ],
)
def test_what_is_no_finite_number_is_refused_for_every_option(value, shown):
    for optimizer in (Sgd(0.1), Adam(0.1)):
        for name in option_names(optimizer):
            if name in {"nesterov", "decoupled"}:
                continue
            with pytest.raises(OptimizerError) as refused:
                check_optimizer(dataclasses.replace(optimizer, **{name: value}))
            text = str(refused.value)
            assert text.startswith(f"{name} is {shown}: expected ")
            assert ("finite" in text) == (name not in {"beta1", "beta2"})


@pytest.mark.parametrize("value", [1, 0.0, "yes", None])
def test_a_flag_is_true_or_false(value):
    for optimizer, name in (
        (Sgd(0.1, 0.9, nesterov=value), "nesterov"),
        (Adam(0.1, decoupled=value), "decoupled"),
    ):
        with pytest.raises(OptimizerError) as refused:
            check_optimizer(optimizer)
        assert str(refused.value) == f"{name} is {value!r}: expected True or False"


def test_an_error_names_the_path_of_the_option():
    with pytest.raises(ValueError, match=r"^groups\[2\]\.adam\.beta1 is 1\.0") as error:
        check_optimizer(Adam(0.1, beta1=1.0), "groups[2].adam")
    assert isinstance(error.value, OptimizerError)
    assert error.value.field == "groups[2].adam.beta1"
