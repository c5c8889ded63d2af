"""Events of row blocks being received, computed and sent, for an observer.

Without an observer a server reports no events. `bench.trace` draws them.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import TypeAlias


class Stage(enum.Enum):
    """A stage of a row block in the server."""

    RECEIVING = "receiving"
    """The operands' bytes are copied from messages to the memory for computing."""

    COMPUTING = "computing"
    """The products are computed, in the worker thread."""

    SENDING = "sending"
    """The results are handed to gRPC, which accepts them as the client reads."""


Observe: TypeAlias = Callable[[str, Stage, int | None], object]
"""Called when a stage of a streamed job's row block begins, continues or ends.

The arguments are the job's id, the stage, and the block's number; None for W (received)
and dW (sent). A stage lasts from its first call to its last. The callback runs in the
event loop and in the worker threads, and must be quick.
"""


ObserveJob: TypeAlias = Callable[[Stage, int | None], object]
"""`Observe` for one job, without the job's id."""


def no_observer(job_id: str, stage: Stage, block: int | None) -> None:
    """Ignore the event."""
