"""The registry of servers: an actor of the pool, asked through Ray."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from grpc import StatusCode
from ray.exceptions import RayActorError, RayError

from gradwire._api.errors import ConnectError
from gradwire_protocol.ray_pool import NAMESPACE, POOL, PoolServer, State

_RECONNECT = "RAY_gcs_rpc_server_reconnect_timeout_s"


class Registry:
    """Asks the pool of the Ray cluster for its servers."""

    def __init__(self) -> None:
        self._pool: Any = None

    def servers(self, timeout_s: float) -> list[PoolServer]:
        """Return the servers that serve.

        Args:
            timeout_s: Seconds that the pool has to answer.

        Raises:
            ConnectError: This program is in no Ray cluster, no pool runs in it, or the
                pool does not answer.
        """
        if not ray.is_initialized():  # without this, Ray would start a cluster
            raise _unavailable("this program is in no Ray cluster")
        try:
            if self._pool is None:
                self._pool = ray.get_actor(POOL, namespace=NAMESPACE)
            found: Sequence[PoolServer] = ray.get(
                self._pool.servers.remote(), timeout=timeout_s
            )
        except ValueError as error:
            raise _unavailable(
                "no pool of gradwire servers runs in this Ray cluster: start one,"
                " gradwire ray up"
            ) from error
        except RayActorError as error:
            self._pool = None  # perhaps there is another one by now
            raise _unavailable(f"the pool has ended: {_sentence(error)}") from error
        except RayError as error:
            raise _unavailable(
                f"the pool of gradwire servers does not answer: {_sentence(error)}"
            ) from error
        serving = (each for each in found if each.state is State.SERVING)
        return sorted(serving, key=lambda each: each.address)

    def some_servers(self, timeout_s: float) -> list[PoolServer]:
        """Return the servers that serve, of which there is at least one.

        Raises:
            ConnectError: As for `servers`, or none serves.
        """
        found = self.servers(timeout_s)
        if not found:
            raise _unavailable("no server of the Ray cluster's pool serves now")
        return found


def join() -> None:
    """Take part in the Ray cluster that is here, unless this program does already.

    Raises:
        ConnectError: There is none, or it refuses this program.
    """
    if ray.is_initialized():
        return
    try:
        with _lasting():
            # Without an address, Ray would start a cluster where there is none.
            ray.init(address="auto", logging_level=logging.WARNING)
    except (ConnectionError, RayError, RuntimeError) as error:
        raise _unavailable(f"no Ray cluster was found: {_sentence(error)}") from error


@contextlib.contextmanager
def _lasting() -> Iterator[None]:
    """Have a program that joins a cluster outlive the cluster's GCS.

    Otherwise Ray ends the program a minute after the GCS is lost, in the middle of its
    jobs.
    """
    if _RECONNECT in os.environ:
        yield
        return
    os.environ[_RECONNECT] = "86400"
    try:
        yield
    finally:
        del os.environ[_RECONNECT]


def _unavailable(text: str) -> ConnectError:
    return ConnectError(text, status=StatusCode.UNAVAILABLE)


def _sentence(error: Exception) -> str:
    return " ".join(str(error).partition("\n")[0].split())
