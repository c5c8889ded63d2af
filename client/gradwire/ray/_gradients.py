"""Gradients of arrays in Ray's object store, on the node that holds them."""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Unpack

import ray
from ray import ObjectRef, cloudpickle
from ray.experimental import get_object_locations
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gradwire._api.errors import ConnectError, ExhaustedError, UnavailableError
from gradwire._api.options import GradientsOptions, check_names, parse_options
from gradwire._api.types import Gradients
from gradwire._client._sync.client import Client
from gradwire._client.connect import connect as connect_to
from gradwire._client.options import ClientOptions
from gradwire.ray._registry import Registry, join
from gradwire_protocol.matrices import RESULTS
from gradwire_protocol.ray_pool import PoolServer

_ANSWER_S = 10.0
"""Seconds that the pool has to answer."""


class _ThreeRefs(NamedTuple):
    y: Any
    dx: Any
    dw: Any


class GradientRefs(_ThreeRefs):
    """References to the results of `gradients`: a tuple (y, dx, dw).

    None in the place of results that are not wanted. The results are on the node that
    computed them.
    """

    receipt: Any
    """Reference to the `gradwire.Receipt`."""

    db: Any
    """Reference to the column sums of dY; None where not wanted."""

    def __new__(cls, y: Any, dx: Any, dw: Any, receipt: Any, db: Any) -> GradientRefs:
        """The references to the results, and to their receipt."""
        self = super().__new__(cls, y, dx, dw)
        self.receipt = receipt
        self.db = db
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        return (*self, self.receipt, self.db)


def gradients(
    x: Any,
    w: Any,
    dy: Any,
    *,
    connection: ClientOptions | None = None,
    **options: Unpack[GradientsOptions],
) -> GradientRefs:
    """Compute Y = X W, dX = dY Wᵀ, dW = Xᵀ dY of arrays in Ray's object store.

    A Ray task (of one CPU) computes them on the node that has most of the operands'
    bytes, with the server of that node; elements stay on the node, and never come to
    this program. Operands on other nodes are fetched first. If that server cannot be
    reached, the job goes to another one of the pool.

    Returns as soon as all operands are there: it waits for the tasks that make them.

    Args:
        x: `ray.ObjectRef` of X, as for `Client.gradients`; None if no wanted result
            needs it. Arrays are put into the object store; the same holds for `w` and
            `dy`.
        w: Reference of W.
        dy: Reference of dY.
        connection: Options of `gradwire.connect`, for the server: ``{"token": ...}``.
            With TLS, the server is called by its loopback address, so its certificate
            must be for that, or `Tls.server_name` must name it.
        **options: Those of `Client.gradients`, without `out`.

    Returns:
        References of the results. If the job fails, getting them raises what
        `Client.gradients` raises.

    Raises:
        InputError: An option is invalid; nothing was computed.
        ConnectError: There is no Ray cluster, no pool in it, or no server in the pool.

    Example:
        >>> refs = gradwire.ray.gradients(x_ref, w_ref, dy_ref)
        >>> dw = ray.get(refs.dw)
    """
    check_names("gradients", options, GradientsOptions)
    check_names("connect", connection or {}, ClientOptions)
    wanted = parse_options(**options).results
    join()
    servers = Registry().some_servers(_ANSWER_S)
    refs = [each for each in (x, w, dy) if isinstance(each, ObjectRef)]
    if refs:
        # Where they are is known once they exist. They must not come here for that.
        ray.wait(refs, num_returns=len(refs), fetch_local=False)
    held = _held_bytes(refs)
    node_id = best_server(servers, held).node_id
    found = [matrix for matrix in RESULTS if matrix in wanted]
    # Arguments of the task's own, not in a list: the node then fetches those that are
    # elsewhere before the task begins. Several `ray.get` of them in the task may each
    # wait for a second.
    returned = _compute.options(
        num_returns=len(found) + 1,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=True),
    ).remote(x, w, dy, _Job(servers, connection or {}, options))
    by_matrix = dict(zip(found, returned, strict=False))
    y, dx, dw, db = (by_matrix.get(matrix) for matrix in RESULTS)
    return GradientRefs(y, dx, dw, returned[-1], db)


def best_server(servers: Sequence[PoolServer], held: Mapping[str, int]) -> PoolServer:
    """Return the server whose node has most of the operands' bytes.

    Args:
        servers: At least one.
        held: Bytes of the operands on each node, by its id.
    """
    return min(
        servers,
        key=lambda each: (
            -held.get(each.node_id, 0),
            each.running_jobs + each.queued_jobs,
        ),
    )


def _held_bytes(refs: Sequence[Any]) -> Mapping[str, int]:
    held: dict[str, int] = defaultdict(int)
    for found in get_object_locations(list(refs)).values():
        for node_id in found["node_ids"]:
            held[node_id] += found["object_size"] or 0
    return held


@dataclass(frozen=True, slots=True)
class _Job:
    """What a task is told beside its operands."""

    servers: Sequence[PoolServer]
    connection: ClientOptions
    options: GradientsOptions

    def run(self, x: Any, w: Any, dy: Any) -> Gradients:
        """Compute on the server of the task's node, or else on another one."""
        *first, last = self._ways()
        for addresses, connection in first:
            with contextlib.suppress(ConnectError, ExhaustedError, UnavailableError):
                client = _client(addresses, connection)
                return client.gradients(x, w, dy, **self.options)
        return _client(*last).gradients(x, w, dy, **self.options)

    def _ways(self) -> Iterator[tuple[Sequence[str], ClientOptions]]:
        here = ray.get_runtime_context().get_node_id()
        local = [each.local_address for each in self.servers if each.node_id == here]
        others = [each.address for each in self.servers if each.node_id != here]
        if local and "transport" not in self.connection:
            # Also for jobs that "auto" would send, for twice the processor time. The
            # server may have no room for it.
            yield local, {"transport": "shm", **self.connection}
        if local:
            yield local, self.connection
        if others:
            yield others, self.connection


@ray.remote(num_cpus=1)
def _compute(x: Any, w: Any, dy: Any, job: _Job) -> tuple[Any, ...]:
    """The task: the results that are wanted, in the order of `RESULTS`, and receipt."""
    found = job.run(x, w, dy)
    results = (each for each in (*found, found.db) if each is not None)
    return (*results, found.receipt)


_clients: dict[bytes, Client] = {}
"""The client of the last task of this process. Its memory, shared with the server, is
used again: to get new memory takes longer than to copy into it."""

_lock = threading.Lock()


def _client(addresses: Sequence[str], connection: ClientOptions) -> Client:
    address = addresses[0] if len(addresses) == 1 else list(addresses)
    key = cloudpickle.dumps((address, connection))
    with _lock:
        if key not in _clients:
            client = connect_to(address, **connection)
            for other in _clients.values():
                other.close()
            _clients.clear()
            _clients[key] = client
        return _clients[key]
