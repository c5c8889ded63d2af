from __future__ import annotations

import copy
import inspect
import pickle
import re

import grpc
import pytest

import gradwire
from gradwire._api import errors
from gradwire_protocol.error_details import ErrorDetails
from gradwire_protocol.error_reasons import Reason

CLASSES = [
    value
    for value in vars(errors).values()
    if inspect.isclass(value) and issubclass(value, gradwire.GradwireError)
]


def test_the_tree_in_the_documentation_is_the_tree_of_classes() -> None:
    documented = {}
    path: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^([ │├└─]*)([A-Z]\w*Error)\b", line)
        if match is None or len(match[1]) < 4:
            continue
        depth = len(match[1])
        while path and path[-1][0] >= depth:
            path.pop()
        documented[match[2]] = path[-1][1] if path else "Exception"
        path.append((depth, match[2]))
    assert documented == {cls.__name__: cls.__mro__[1].__name__ for cls in CLASSES}


@pytest.mark.parametrize("cls", CLASSES)
def test_every_exception_is_public(cls: type[Exception]) -> None:
    assert cls.__name__ in gradwire.__all__


def test_every_status_but_ok_has_a_class() -> None:
    assert set(errors.BY_STATUS) == set(grpc.StatusCode) - {grpc.StatusCode.OK}


@pytest.mark.parametrize("reason", errors.BY_REASON)
def test_the_class_of_a_reason_is_one_of_its_statuss(reason: Reason) -> None:
    broad = errors.BY_STATUS[reason.status]
    assert issubclass(errors.BY_REASON[reason], broad)


@pytest.mark.parametrize("cls", CLASSES)
def test_an_exception_is_the_same_after_pickling_and_copying(
    cls: type[gradwire.GradwireError],
) -> None:
    error = cls(
        "what happened",
        status=grpc.StatusCode.RESOURCE_EXHAUSTED,
        attached=ErrorDetails(
            reason=Reason.BUSY,
            fields={"job.n": "too large"},
            metadata={"job_id": "j-1", "error_id": "e"},
            retry_after_s=2.5,
        ),
        details="the server's text",
    )
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is cls
        assert str(twin) == "what happened"
        assert vars(twin) == vars(error)
        assert twin.reason is Reason.BUSY
        assert twin.job_id == "j-1"
        assert twin.retry_after_s == 2.5


@pytest.mark.parametrize(
    ("cls", "builtin"),
    [
        (gradwire.InputError, ValueError),
        (gradwire.ClientStateError, RuntimeError),
        (gradwire.ConnectError, ConnectionError),
        (gradwire.ConnectionLostError, ConnectionError),
        (gradwire.DeadlineError, TimeoutError),
    ],
)
def test_code_that_knows_only_python_catches_it(
    cls: type[Exception], builtin: type[Exception]
) -> None:
    assert issubclass(cls, builtin)
