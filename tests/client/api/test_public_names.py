from __future__ import annotations

import inspect
from typing import Any

import pytest

import gradwire
from gradwire._api import errors, types
from gradwire._client import _async, _sync
from gradwire._resilience import retry

MODULES = (
    *(_async.client, _async.stream, _sync.client, _sync.stream),
    *(errors, retry, types),
)
# What the SDK uses among its own modules.
INTERNAL = {
    *("device_of", "merged_receipt", "receipt_of", "server_info_of"),
    "spread_receipt",
    *("Attempts", "OvertakenError", "Retries", "is_transient", "parse_retries"),
}
CLASSES = [
    getattr(gradwire, name)
    for name in gradwire.__all__
    if inspect.isclass(getattr(gradwire, name))
]


def methods(cls: type) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(cls).items()
        if not name.startswith("_") and inspect.isfunction(value)
    }


def test_all_names_everything_that_is_public() -> None:
    public = {
        name
        for module in MODULES
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    }
    assert public - INTERNAL <= set(gradwire.__all__)
    assert len(set(gradwire.__all__)) == len(gradwire.__all__)


@pytest.mark.parametrize("name", gradwire.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    value = getattr(gradwire, name)
    assert inspect.getdoc(value)
    if inspect.isclass(value):
        for method_name, method in methods(value).items():
            assert inspect.getdoc(method), f"{name}.{method_name}"


@pytest.mark.parametrize("cls", [gradwire.Client, gradwire.AsyncClient])
@pytest.mark.parametrize(
    "name", ["gradients", "forward", "backward", "stream", "server_info"]
)
def test_every_call_is_documented_by_an_example(cls: type, name: str) -> None:
    assert "Example:" in (inspect.getdoc(getattr(cls, name)) or "")


def test_both_clients_have_the_same_methods_with_the_same_parameters() -> None:
    sync, aio = methods(gradwire.Client), methods(gradwire.AsyncClient)
    assert set(sync) == set(aio)
    for name in aio:
        one, other = inspect.signature(sync[name]), inspect.signature(aio[name])
        assert list(one.parameters) == list(other.parameters), name
        for parameter in one.parameters:
            assert (
                one.parameters[parameter].default == other.parameters[parameter].default
            ), (name, parameter)


def test_the_package_is_typed() -> None:
    from importlib import resources

    assert (resources.files("gradwire") / "py.typed").is_file()
