"""What gRPC's own log says of a server, without what is no trouble."""

from __future__ import annotations

import logging

_log = logging.getLogger("gradwire_server")
_grpc_log = logging.getLogger("grpc._cython.cygrpc")


def keep_departures_from_log() -> None:
    """Has gRPC log no error where a client has only left before its status came.

    gRPC keeps quiet about it where it knows that the client has left; where it
    hears of that a moment after it failed to send, it logs an error with a
    traceback, and the operator can do nothing about either.

    Nor one for each entry of a call's metadata that is no UTF-8: a call can have a
    thousand of them. gRPC goes on with what they are in Latin-1.
    """
    _grpc_log.addFilter(_is_no_departure)
    _grpc_log.addFilter(_is_no_metadata)


def _is_no_departure(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    # A batch that gRPC takes fails only once its call is over. One that it does not
    # take, "Failed grpc_call_start_batch", is a defect of the server's.
    if type(error).__name__ != "ExecuteBatchError":
        return True
    if not str(error).startswith('Failed "execute_batch"'):
        return True
    _log.debug("a client left before its call's end was sent")
    return False


def _is_no_metadata(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Invalid encoding on ")
