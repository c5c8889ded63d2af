"""The actors of a pool: the pool itself, and a server on each node."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gradwire_protocol.ray_pool import NAMESPACE, POOL, PoolServer, PoolStatus
from gradwire_ray.host import ServerHost
from gradwire_ray.pool import GoneError, Node, Pool
from gradwire_ray.settings import PoolSettings

_log = logging.getLogger("gradwire_ray")

STEP_S = 1.0
"""Seconds between two steps of the pool."""

_SERVER = "server-"
"""Names of servers' actors begin with it; the id of the node follows."""

# Ray makes the processes of actors nice by 15: next to anything else, a server would
# starve. And it ends a process whose cluster has been without its GCS for a minute.
_ENVIRONMENT = {
    "RAY_worker_niceness": "0",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "86400",
}


class PoolActor:
    """The pool: an actor that outlives the program that started it.

    It answers from the state of its last step, so it answers at once, also while Ray
    does not. It ends with its node's raylet.
    """

    def __init__(self, settings: PoolSettings) -> None:
        logging.basicConfig(level=logging.INFO)
        self._settings = settings
        self._pool = Pool(settings, RayCluster(settings))
        threading.Thread(target=self._run, name="gradwire-pool", daemon=True).start()

    def servers(self) -> tuple[PoolServer, ...]:
        """Return the servers, for `gradwire.ray.connect`."""
        return self._pool.status().servers

    def status(self) -> PoolStatus:
        """Return the state of the pool."""
        return self._pool.status()

    def settings(self) -> PoolSettings:
        """Return the settings."""
        return self._settings

    def stop(self) -> None:
        """Begin to stop all servers. The pool remains."""
        self._pool.stop()

    def _run(self) -> None:
        raylet = os.getppid()
        while os.getppid() == raylet:
            try:
                self._pool.step(time.monotonic())
            except Exception:  # noqa: BLE001 - of Ray, of any kind: it may do next time
                _log.exception("the pool looks again in %s s", STEP_S)
            time.sleep(STEP_S)
        os._exit(0)


def start_pool(settings: PoolSettings) -> Any:
    """Start the pool's actor; return its handle.

    It restarts on another node if its own dies, and takes over the servers.
    """
    actor: Any = ray.remote(PoolActor)
    return actor.options(
        name=POOL,
        namespace=NAMESPACE,
        lifetime="detached",
        num_cpus=0,
        max_restarts=-1,
        runtime_env={"env_vars": _ENVIRONMENT},
    ).remote(settings)


def server_names() -> list[str]:
    """Return the names of all servers' actors."""
    return [
        each["name"]
        for each in ray.util.list_named_actors(all_namespaces=True)
        if each["namespace"] == NAMESPACE and each["name"].startswith(_SERVER)
    ]


class RayCluster:
    """The `Cluster` of a pool."""

    def __init__(self, settings: PoolSettings) -> None:
        self._settings = settings
        self._handles: dict[str, Any] = {}

    def nodes(self) -> Sequence[Node]:
        """Return the nodes that are alive."""
        return [
            Node(
                node["NodeID"],
                node["NodeManagerAddress"],
                node["Resources"].get("CPU", 0.0),
                node["Resources"].get("GPU", 0.0),
            )
            for node in ray.nodes()
            if node["Alive"]
        ]

    def existing(self) -> Sequence[str]:
        """Return the ids of the nodes that have servers."""
        return [name.removeprefix(_SERVER) for name in server_names()]

    def call(self, node: Node, method: str) -> RayAnswer:
        """Begin a call; that of ``start`` makes the actor, unless there is one."""
        if method == "start":
            self._handles[node.id] = self._make(node)
        return RayAnswer(getattr(self._handles[node.id], method))

    def kill(self, node: Node) -> None:
        """End a server's process."""
        handle = self._handles.pop(node.id, None)
        if handle is not None:
            ray.kill(handle)

    def request(self, bundles: list[dict[str, float]]) -> None:
        """Ask the autoscaler for nodes."""
        # Imported here: few pools need it.
        from ray.autoscaler.sdk import request_resources  # noqa: PLC0415

        request_resources(bundles=bundles)

    def _make(self, node: Node) -> Any:
        settings = self._settings
        actor: Any = ray.remote(ServerHost)
        return actor.options(
            name=_SERVER + node.id,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            # Its products are computed beside the node's tasks, which have its CPUs.
            num_cpus=0,
            num_gpus=0 if settings.server.backend == "numpy" else int(node.gpus),
            # A server that drains says how many jobs are left.
            max_concurrency=4,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
            runtime_env={"env_vars": _ENVIRONMENT},
        ).remote(node.host, settings)


class RayAnswer:
    """The answer of an actor, made again while the actor cannot be reached."""

    def __init__(self, method: Any) -> None:
        self._method = method
        self._ref = method.remote()

    def poll(self) -> Any:
        """Return the answer, or None if there is none yet.

        Raises:
            GoneError: The actor's process has ended.
            Exception: What the method raised.
        """
        ready, _ = ray.wait([self._ref], timeout=0)
        if not ready:
            return None
        try:
            answer = ray.get(self._ref)
        except ActorUnavailableError:
            # Perhaps for a moment: the pool gives it up after a while.
            self._ref = self._method.remote()
            return None
        except RayActorError as error:
            raise GoneError(_first_line(error)) from error
        except RayTaskError as error:
            if not isinstance(error.cause, TimeoutError):
                raise error.cause from error
            self._ref = self._method.remote()
            return None
        # A method that returns nothing has answered all the same.
        return True if answer is None else answer


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
