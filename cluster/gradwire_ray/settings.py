"""The settings of a pool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from gradwire_server.settings import Settings


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """The operator's settings.

    Raises:
        ValueError: A value is out of range; the text names the field.
    """

    nodes: int | None = None
    """Number of servers, each on a node of its own; the least number with `max_nodes`.
    None: one on every node."""

    max_nodes: int | None = None
    """Most servers. While jobs wait, Ray's autoscaler is asked for more nodes. None:
    the number stays."""

    port: int = 50051
    """Port of every server, on its node's IP address and on loopback. 0: a free one."""

    server: Settings = field(default_factory=Settings)
    """Settings of every server. `listen` is not used."""

    prepare: Callable[[], object] | None = field(default=None, compare=False)
    """Called in the process of every server before it starts, for example to set up its
    log."""

    def __post_init__(self) -> None:
        if self.nodes is not None and self.nodes < 1:
            raise ValueError(f"nodes is {self.nodes}: expected at least 1")
        if not 0 <= self.port < 65536:
            raise ValueError(f"port is {self.port}: expected a number from 0 to 65535")
        if self.max_nodes is None:
            return
        if self.nodes is None:
            raise ValueError("max_nodes is set without nodes, the least number")
        if self.max_nodes < self.nodes:
            raise ValueError(
                f"max_nodes is {self.max_nodes}: expected at least nodes, {self.nodes}"
            )
