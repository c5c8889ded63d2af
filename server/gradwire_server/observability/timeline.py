"""When each row block was received, computed and sent: for who wants to see it.

A server tells nobody unless it is given an observer. `bench.trace` draws what
one has seen.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import TypeAlias


class Stage(enum.Enum):
    """A part of a row block's way through the server."""

    RECEIVING = "receiving"
    """Its operands' bytes are taken from messages to the memory that they are
    computed in."""

    COMPUTING = "computing"
    """Its products are computed, in the lane's thread."""

    SENDING = "sending"
    """Its results are handed to gRPC, which takes them as the client reads."""


Observe: TypeAlias = Callable[[str, Stage, int | None], object]
"""Told of a streamed job that a stage of a row block begins, goes on or ends.

Its arguments are the job's id, the stage, and the number of the block; None
for W, which is received, and dW, which is sent. A stage lasts from the first
time that it is told until the last. It is called from the event loop and from
the lanes' threads, and must be quick.
"""


ObserveJob: TypeAlias = Callable[[Stage, int | None], object]
"""The same for one job, whose id it knows."""


def no_observer(job_id: str, stage: Stage, block: int | None) -> None:
    """Nobody looks."""
