"""When the stages of a job began and ended, for the spans of a traced call."""

from __future__ import annotations

import time


class Interval:
    """From the first to the last activity of a stage.

    Attributes:
        first: Begin of the first activity, by `time.perf_counter`; 0 if there was none.
        last: End of the last one.
    """

    __slots__ = ("first", "last")

    def __init__(self) -> None:
        self.first = 0.0
        self.last = 0.0

    def since(self, began: float) -> None:
        """Count an activity that began at `began`, and ends or goes on now."""
        if not self.first:
            self.first = began
        self.last = time.perf_counter()


class StageIntervals:
    """The stages of one job that has row blocks in all of them at once."""

    __slots__ = ("compute", "receive", "send")

    def __init__(self) -> None:
        self.receive = Interval()
        self.compute = Interval()
        """Updated by the thread of the job's device."""
        self.send = Interval()
