"""How many servers there should be, from the lengths of their queues."""

from __future__ import annotations

from dataclasses import dataclass, field

UP_AFTER_S = 10.0
"""Seconds for which jobs must wait before there are more servers."""

DOWN_AFTER_S = 300.0
"""Seconds for which servers must be idle before there is one less. A node takes minutes
to start, and its price is often that of a whole minute or hour."""

COME_S = 300.0
"""Seconds to wait for servers that were wanted, before more of them are."""


@dataclass(slots=True)
class Scaler:
    """Sets the number of servers between two bounds, with hysteresis.

    It grows by half when as many jobs wait as there are servers, for `UP_AFTER_S`. It
    shrinks by one when no job waits and a server could be spared, for `DOWN_AFTER_S`:
    when the jobs that run, one to a server, leave at least one without.

    Args:
        least: Least number of servers.
        most: Most.
    """

    least: int
    most: int
    wanted: int = field(init=False)
    """The number of servers that there should be."""
    _busy_since: float | None = field(default=None, init=False)
    _idle_since: float | None = field(default=None, init=False)
    _grown_at: float = field(default=float("-inf"), init=False)

    def __post_init__(self) -> None:
        self.wanted = self.least

    def observe(self, now: float, servers: int, running: int, queued: int) -> int:
        """Take the present load into account.

        Args:
            now: A monotonic time, in seconds.
            servers: Number of servers that serve.
            running: Jobs that run on them, all together.
            queued: Jobs that wait on them.

        Returns:
            The number of servers that there should be.
        """
        busy = servers > 0 and queued >= servers
        idle = queued == 0 and running < servers
        self._busy_since = _since(self._busy_since, now) if busy else None
        self._idle_since = _since(self._idle_since, now) if idle else None
        arriving = servers < self.wanted and now - self._grown_at < COME_S
        if self._busy_since is not None and not arriving:
            if now - self._busy_since >= UP_AFTER_S:
                self._set(self.wanted + (self.wanted + 1) // 2)
                self._busy_since, self._grown_at = now, now
        elif self._idle_since is not None and now - self._idle_since >= DOWN_AFTER_S:
            self._set(self.wanted - 1)
            self._idle_since = now
        return self.wanted

    def _set(self, wanted: int) -> None:
        self.wanted = max(self.least, min(self.most, wanted))


def _since(earlier: float | None, now: float) -> float:
    return now if earlier is None else earlier


def bundles(wanted: int, shapes: list[dict[str, float]]) -> list[dict[str, float]]:
    """Return the resources to request from Ray's autoscaler for so many nodes.

    A bundle is as large as the smallest of the present nodes, so that no two of them
    fit on one node of that size.

    Args:
        wanted: Number of nodes.
        shapes: ``CPU`` and ``GPU`` of the nodes that have servers now. Without any, a
            bundle is one CPU, for which there is at least one node.
    """
    shapes = shapes or [{"CPU": 1.0}]
    kind = "GPU" if all(shape.get("GPU", 0) > 0 for shape in shapes) else "CPU"
    size = min(shape.get(kind, 0) for shape in shapes)
    return [{kind: size} for _ in range(wanted)] if size > 0 else []
