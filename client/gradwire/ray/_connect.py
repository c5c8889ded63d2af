"""A client of all servers of the pool."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from typing import Unpack

from gradwire._api.errors import ClientStateError, ConnectError, GradwireError
from gradwire._api.options import check_names, parse_timeout
from gradwire._client._sync.client import Client
from gradwire._client.connect import connect as connect_to
from gradwire._client.options import ClientOptions
from gradwire.ray._registry import Registry, join

_log = logging.getLogger("gradwire")

FOLLOW_S = 1.0
"""Seconds between two looks at the registry."""

_ANSWER_S = 10.0
"""Seconds that the pool has to answer."""


def connect(**options: Unpack[ClientOptions]) -> Client:
    """Connect to all servers of the Ray cluster's pool.

    The client is an ordinary one of several servers (docs/several-servers.md). It
    follows the pool: servers that join get jobs, and those that leave finish theirs. If
    the pool or Ray is lost, the client goes on with the servers that it knows.

    This program takes part in the Ray cluster that `ray.init` joined, or else in the
    one that ``ray.init(address="auto")`` finds.

    Args:
        **options: Those of `gradwire.connect`, all of them optional. With
            `wait_for_ready_s` it also waits for a pool and for the first of its
            servers.

    Returns:
        A client, once a server has answered.

    Raises:
        InputError: An argument is invalid.
        ConnectError: There is no Ray cluster, no pool in it, or no server that
            answers.

    Example:
        >>> with gradwire.ray.connect(token=TOKEN) as client:
        ...     y, dx, dw = client.gradients(x, w, dy)
    """
    check_names("connect", options, ClientOptions)
    join()
    registry = Registry()
    addresses = _first_addresses(
        registry,
        parse_timeout(options.get("wait_for_ready_s"), "wait_for_ready_s") or 0.0,
    )
    client = connect_to(addresses, **options)
    threading.Thread(
        target=_follow,
        args=(weakref.ref(client), registry, addresses),
        name="gradwire-ray",
        daemon=True,
    ).start()
    return client


def _first_addresses(registry: Registry, wait_s: float) -> list[str]:
    deadline = time.monotonic() + wait_s
    while True:
        try:
            return [each.address for each in registry.some_servers(_ANSWER_S)]
        except ConnectError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(min(FOLLOW_S, wait_s))


def _addresses(registry: Registry) -> list[str]:
    return [each.address for each in registry.servers(_ANSWER_S)]


def _follow(
    client_ref: weakref.ref[Client], registry: Registry, known: list[str]
) -> None:
    """Tell a client of the pool's servers until it is closed or collected."""
    lost = False
    while True:
        time.sleep(FOLLOW_S)
        if _closed(client_ref()):
            return
        try:
            addresses = _addresses(registry)
        except Exception as error:  # noqa: BLE001 - of Ray, of any kind: jobs go on
            if not lost:
                _log.warning("the pool is lost, its servers are used on: %s", error)
            lost = True
            continue
        lost = False
        client = client_ref()
        if client is None or _closed(client):
            return
        # Where none serves, it is the pool that has a problem, or is about to end.
        if addresses and addresses != known:
            try:
                client.set_servers(addresses)
            except ClientStateError:  # it was closed meanwhile
                return
            except GradwireError as error:
                _log.warning("the servers of the pool cannot be used: %s", error)
            known = addresses
        del client


def _closed(client: Client | None) -> bool:
    return client is None or client._engine.closed
