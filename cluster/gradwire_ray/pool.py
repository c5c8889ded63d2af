"""What the pool does: it compares servers and nodes, starts servers and stops them.

`Pool.step` is called about once a second. It waits for nothing: calls to a server are
begun in one step and looked at in later ones.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gradwire_protocol.ray_pool import PoolServer, PoolStatus, State
from gradwire_ray.host import Load, Started
from gradwire_ray.scaling import Scaler, bundles
from gradwire_ray.settings import PoolSettings

START_S = 120.0
"""Seconds for a server to start. CUDA and a cold file system take their time, and Ray
may first have to notice that the node is dead (15 s)."""

SILENT_S = 5.0
"""Seconds without an answer after which a server is silent."""

GIVEN_UP_S = 60.0
"""Seconds without an answer after which a server is killed, and started anew."""

SLACK_S = 15.0
"""Seconds beyond its grace period after which a server that drains is killed."""

STABLE_S = 60.0
"""Seconds for which a server must serve until earlier failures of its node are
forgotten."""

FIRST_PAUSE_S = 1.0
MOST_PAUSE_S = 60.0
"""Seconds until a server is started again after its first failure on a node, and at
most. They double with each failure."""


@dataclass(frozen=True, slots=True)
class Node:
    """A node that is alive."""

    id: str
    host: str
    """Its IP address."""
    cpus: float
    gpus: float

    @property
    def has_room(self) -> bool:
        """Whether it is meant for work: a head often has no CPUs in Ray's eyes."""
        return self.cpus > 0 or self.gpus > 0


class Answer(Protocol):
    """The answer of a call to a server, which may still be on its way."""

    def poll(self) -> Any:
        """Return the answer, or None if there is none yet.

        Raises:
            GoneError: The server's process has ended.
            Exception: The call has failed.
        """


class GoneError(Exception):
    """The process of a server has ended."""


class Cluster(Protocol):
    """What the pool asks of Ray."""

    def nodes(self) -> Sequence[Node]:
        """Return the nodes that are alive.

        Raises:
            Exception: Ray does not answer.
        """

    def existing(self) -> Sequence[str]:
        """Return the ids of the nodes that have servers of an earlier pool."""

    def call(self, node: Node, method: str) -> Answer:
        """Begin a call of `ServerHost`; the call of ``start`` makes its actor."""

    def kill(self, node: Node) -> None:
        """End a server's process, if there is one."""

    def request(self, bundles: list[dict[str, float]]) -> None:
        """Ask the autoscaler for nodes with these resources, and no others."""


@dataclass(slots=True)
class Member:
    """A server of the pool."""

    node: Node
    since: float
    """When its present state began."""
    answer: Answer
    """The call that is under way."""
    asked_at: float
    state: State = State.STARTING
    started: Started | None = None
    load: Load | None = None

    @property
    def jobs(self) -> int:
        """Jobs that run or wait, as far as known."""
        return 0 if self.load is None else self.load.running + self.load.queued

    def server(self) -> PoolServer:
        """What the pool tells of it."""
        known: dict[str, Any] = {}
        if self.started is not None:
            known |= dataclasses.asdict(self.started)
        if self.load is not None:
            known["running_jobs"] = self.load.running
            known["queued_jobs"] = self.load.queued
        return PoolServer(self.node.id, self.node.host, self.state, **known)


@dataclass(slots=True)
class Failures:
    """The failures of a node since a server last served there for a while."""

    count: int = 0
    retry_at: float = 0.0
    text: str = ""


class Pool:
    """The servers of a pool. `step` is for one thread, all else for any.

    Args:
        settings: The operator's settings.
        cluster: Ray.
    """

    def __init__(self, settings: PoolSettings, cluster: Cluster) -> None:
        self._settings = settings
        self._cluster = cluster
        self._members: dict[str, Member] = {}
        self._failures: dict[str, Failures] = {}
        self._nodes: dict[str, Node] = {}
        self._wanted = 0
        self._stopping = False
        self._adopted = False
        self._scaler = None
        if settings.nodes is not None and settings.max_nodes is not None:
            self._scaler = Scaler(settings.nodes, settings.max_nodes)
        self._requested: list[dict[str, float]] = []
        self._lock = threading.Lock()
        self._status = PoolStatus((), 0, stopping=False, failures=())

    def stop(self) -> None:
        """Begin to stop all servers."""
        with self._lock:
            self._stopping = True

    def status(self) -> PoolStatus:
        """Return the state after the last step."""
        with self._lock:
            return self._status

    def step(self, now: float) -> None:
        """Look at servers and nodes once, and do what is due.

        Args:
            now: A monotonic time, in seconds.
        """
        nodes = self._look_at_nodes()
        for member in list(self._members.values()):
            self._look_at(member, now)
        if nodes is not None:
            self._adopt(now)
            for member in list(self._members.values()):
                if member.node.id not in nodes:
                    self._drop(member, now, "its node has gone", kill=True)
            self._balance(now, nodes)
        with self._lock:
            self._status = PoolStatus(
                tuple(each.server() for each in self._members.values()),
                self._wanted,
                self._stopping,
                self._reasons(),
            )

    def _look_at_nodes(self) -> Mapping[str, Node] | None:
        """Return the nodes, or None if Ray does not say: then all stays as it is."""
        try:
            self._nodes = {node.id: node for node in self._cluster.nodes()}
        except Exception:  # noqa: BLE001 - of any kind: the servers go on without Ray
            return None
        return self._nodes

    def _adopt(self, now: float) -> None:
        """Take over the servers of an earlier pool, once."""
        if self._adopted:
            return
        for node_id in self._cluster.existing():
            if node_id in self._nodes and node_id not in self._members:
                self._start(self._nodes[node_id], now)
        self._adopted = True

    def _look_at(self, member: Member, now: float) -> None:
        try:
            answer = member.answer.poll()
        except GoneError as error:
            self._drop(member, now, str(error))
            return
        except Exception as error:  # noqa: BLE001 - whatever the server raised
            self._failed(member, now, error)
            return
        if answer is None:
            self._look_at_silent(member, now)
        elif member.state is State.STARTING:
            member.started = answer
            self._set_state(member, State.SERVING, now)
            self._ask(member, now)
        elif member.state is State.DRAINING:
            self._drop(member, now)
        else:
            member.load = answer
            self._set_state(member, State.SERVING, now)
            if now - member.since >= STABLE_S:
                self._failures.pop(member.node.id, None)
            self._ask(member, now)

    def _look_at_silent(self, member: Member, now: float) -> None:
        silent_s = now - member.asked_at
        if member.state is State.STARTING:
            if silent_s > START_S:
                why = f"it did not start in {START_S:.0f} s: are its GPUs in use?"
                self._drop(member, now, why, kill=True)
        elif member.state is State.DRAINING:
            if silent_s > self._settings.server.grace + SLACK_S:
                self._drop(member, now)
        elif silent_s > GIVEN_UP_S:
            self._drop(
                member, now, f"it did not answer for {GIVEN_UP_S:.0f} s", kill=True
            )
        elif silent_s > SILENT_S:
            self._set_state(member, State.SILENT, now)

    def _failed(self, member: Member, now: float, error: Exception) -> None:
        """A call has failed, and the server's process may still be there."""
        self._drop(member, now, str(error) or type(error).__name__, kill=True)

    def _ask(self, member: Member, now: float) -> None:
        member.answer, member.asked_at = self._cluster.call(member.node, "load"), now

    def _start(self, node: Node, now: float) -> None:
        answer = self._cluster.call(node, "start")
        self._members[node.id] = Member(node, now, answer, now)

    def _drain(self, member: Member, now: float) -> None:
        self._set_state(member, State.DRAINING, now)
        member.answer, member.asked_at = self._cluster.call(member.node, "drain"), now

    def _drop(
        self, member: Member, now: float, cause: str = "", *, kill: bool = False
    ) -> None:
        if kill or member.state is State.DRAINING:
            self._cluster.kill(member.node)
        del self._members[member.node.id]
        if cause and member.state is not State.DRAINING:
            failures = self._failures.setdefault(member.node.id, Failures())
            pause_s = min(MOST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(failures.count, 10))
            failures.count += 1
            failures.retry_at, failures.text = now + pause_s, cause

    @staticmethod
    def _set_state(member: Member, state: State, now: float) -> None:
        if member.state is not state:
            member.state, member.since = state, now

    def _balance(self, now: float, nodes: Mapping[str, Node]) -> None:
        """Start the servers that are missing, and drain those that are too many."""
        with self._lock:
            stopping = self._stopping
        able = [node for node in nodes.values() if node.has_room]
        self._wanted = 0 if stopping else self._goal(now, len(able))
        self._request_nodes()
        there = [m for m in self._members.values() if m.state is not State.DRAINING]
        spare = len(there) - self._wanted
        # One that starts may be the busy server of an earlier pool.
        if stopping or all(member.load is not None for member in there):
            for member in sorted(there, key=_first_to_go)[: max(0, spare)]:
                self._drain(member, now)
        free = [
            node
            for node in able
            if node.id not in self._members
            and self._failures.get(node.id, _NO_FAILURES).retry_at <= now
        ]
        for node in sorted(free, key=self._last_to_start)[: max(0, -spare)]:
            self._start(node, now)

    def _goal(self, now: float, able: int) -> int:
        if self._settings.nodes is None:
            return able
        if self._scaler is None:
            return self._settings.nodes
        serving = [m for m in self._members.values() if m.state is State.SERVING]
        loads = [member.load for member in serving if member.load is not None]
        return self._scaler.observe(
            now,
            len(serving),
            sum(load.running for load in loads),
            sum(load.queued for load in loads),
        )

    def _request_nodes(self) -> None:
        """Tell the autoscaler how many nodes there should be, if it has changed."""
        if self._settings.nodes is None:
            return
        there = [m for m in self._members.values() if m.state is not State.DRAINING]
        shapes = [{"CPU": each.node.cpus, "GPU": each.node.gpus} for each in there]
        if not shapes and self._requested:
            shapes = self._requested[:1]  # what they were like
        asked = bundles(self._wanted, shapes)
        if asked != self._requested:
            self._cluster.request(asked)
            self._requested = asked

    def _last_to_start(self, node: Node) -> tuple[int, float, float]:
        """Nodes that have not failed come first, then those with more devices."""
        failures = self._failures.get(node.id, _NO_FAILURES)
        return failures.count, -node.gpus, -node.cpus

    def _reasons(self) -> tuple[tuple[str, str], ...]:
        return tuple(
            (self._nodes[node_id].host, failures.text)
            for node_id, failures in self._failures.items()
            if node_id in self._nodes and node_id not in self._members
        )


_NO_FAILURES = Failures()


def _first_to_go(member: Member) -> tuple[bool, int]:
    """Servers that do not serve go first, then those with fewer jobs."""
    return member.state is State.SERVING, member.jobs
