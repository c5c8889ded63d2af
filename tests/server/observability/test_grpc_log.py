"""gRPC's log has what is wrong with a server, and not that clients leave."""

import logging

import pytest

from gradwire_server.observability.grpc_log import keep_departures_from_log

TEXT = "ExecuteBatchError raised in core by servicer method [/gradwire.v1/Compute]"


class ExecuteBatchError(Exception):
    """Of the name and text of gRPC's, which cannot be imported everywhere."""


@pytest.fixture
def grpc_log() -> logging.Logger:
    for _ in range(2):  # two servers of a process
        keep_departures_from_log()
    return logging.getLogger("grpc._cython.cygrpc")


def logged(log: logging.Logger, error: Exception) -> None:
    try:
        raise error
    except type(error):
        log.exception(TEXT)


def test_a_client_that_left_before_its_status_came_is_no_error(grpc_log, caplog):
    caplog.set_level(logging.DEBUG, "gradwire_server")
    logged(grpc_log, ExecuteBatchError('Failed "execute_batch": (SendStatus,)'))
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("gradwire_server", "DEBUG")
    assert record.exc_info is None


@pytest.mark.parametrize(
    "error",
    [
        ExecuteBatchError("Failed grpc_call_start_batch: 8 with grpc_call_error value"),
        RuntimeError('Failed "execute_batch"'),
    ],
    ids=["a batch that gRPC does not take", "anything else"],
)
def test_what_is_wrong_is_logged_as_before(grpc_log, caplog, error):
    logged(grpc_log, error)
    (record,) = caplog.records
    assert record.getMessage() == TEXT
    assert record.exc_info[1] is error
