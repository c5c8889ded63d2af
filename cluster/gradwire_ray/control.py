"""Starting a pool, looking at it and stopping it."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.exceptions import (
    ActorAlreadyExistsError,
    AuthenticationError,
    GetTimeoutError,
    RayError,
)

from gradwire_protocol.ray_pool import NAMESPACE, POOL, PoolStatus, State
from gradwire_ray.actors import server_names, start_pool
from gradwire_ray.pool import SLACK_S
from gradwire_ray.settings import PoolSettings

_ANSWER_S = 10.0
_STEP_S = 0.25


class PoolError(Exception):
    """The pool cannot be started, asked or stopped; the text is for the operator."""


@contextlib.contextmanager
def joined(address: str) -> Iterator[None]:
    """Take part in a Ray cluster until the context is left.

    Args:
        address: Its address for `ray.init`: ``auto``, or ``HOST:PORT`` of its GCS.

    Raises:
        PoolError: There is no cluster, or it refuses this program.
    """
    try:
        ray.init(
            address=address,
            namespace=NAMESPACE,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, AuthenticationError, RuntimeError, ValueError) as error:
        raise PoolError(f"no Ray cluster at {address}: {_sentence(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()


def up(
    settings: PoolSettings,
    timeout_s: float,
    report: Callable[[PoolStatus], None] = lambda _: None,
) -> PoolStatus:
    """Start the pool, or change the number of servers of the running one.

    Args:
        settings: The pool's settings.
        timeout_s: Seconds to wait for the servers.
        report: Called with the state, now and then.

    Returns:
        The state once all servers serve, or when the time is over.

    Raises:
        PoolError: A pool with other settings runs already.
    """
    pool = find()
    if pool is None:
        pool = _start(settings)
    else:
        running = _answer(pool.settings.remote())
        if (running.port, running.server) != (settings.port, settings.server):
            raise PoolError(
                "a pool with other settings of its servers runs already: stop it first,"
                " with gradwire ray down"
            )
        if running != settings:
            # A pool that restarts has the settings that it was made with. So there is a
            # new one, which takes over the servers.
            ray.kill(pool)
            pool = _start(settings)
    deadline = time.monotonic() + timeout_s
    status = _status(pool, timeout_s)
    while time.monotonic() < deadline:
        report(status)
        time.sleep(_STEP_S)
        status = _status(pool)
        if status.wanted and serving(status) >= status.wanted:
            break
    return status


def status() -> PoolStatus:
    """Return the state of the pool.

    Raises:
        PoolError: There is none, or it does not answer.
    """
    pool = find()
    if pool is None:
        raise PoolError("no pool runs in this Ray cluster: start one, gradwire ray up")
    return _status(pool)


def down(report: Callable[[PoolStatus], None] = lambda _: None) -> int:
    """Stop all servers, which finish their running jobs within `grace`, and the pool.

    Args:
        report: Called with the state, now and then.

    Returns:
        The number of servers that were there.
    """
    pool = find()
    there = len(server_names())
    if pool is not None:
        with contextlib.suppress(PoolError):  # what does not answer is killed below
            settings: PoolSettings = _answer(pool.settings.remote())
            _answer(pool.stop.remote())
            deadline = time.monotonic() + settings.server.grace + 2 * SLACK_S
            while time.monotonic() < deadline:
                state = _status(pool)
                if state.stopping and not state.servers:
                    break
                report(state)
                time.sleep(_STEP_S)
        ray.kill(pool)
    for name in server_names():
        with contextlib.suppress(ValueError):  # it has ended by itself
            ray.kill(ray.get_actor(name, namespace=NAMESPACE))
    return there


def _start(settings: PoolSettings) -> Any:
    deadline = time.monotonic() + _ANSWER_S
    while True:
        try:
            return start_pool(settings)
        except ActorAlreadyExistsError:  # the one before is about to end
            if time.monotonic() > deadline:
                raise
        time.sleep(_STEP_S)


def find() -> Any:
    """Return the handle of the pool's actor, or None."""
    try:
        return ray.get_actor(POOL, namespace=NAMESPACE)
    except ValueError:
        return None


def serving(status: PoolStatus) -> int:
    """Return the number of servers that serve."""
    return sum(server.state is State.SERVING for server in status.servers)


def _status(pool: Any, timeout_s: float = _ANSWER_S) -> PoolStatus:
    found: PoolStatus = _answer(pool.status.remote(), timeout_s)
    return found


def _answer(ref: Any, timeout_s: float = _ANSWER_S) -> Any:
    try:
        return ray.get(ref, timeout=timeout_s)
    except GetTimeoutError:
        raise PoolError(f"the pool did not answer in {timeout_s:g} s") from None
    except RayError as error:
        raise PoolError(f"the pool does not answer: {_sentence(error)}") from error


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split("\n", 1)[0].split())
