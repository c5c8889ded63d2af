"""How many rows a job can have, by what its connections have said so far.

Connections do not keep step, and one that waits for room in the ring reads
nothing. Two that contradict each other must therefore be found out from what
came, before End does: else each would wait for what the other never brings.
"""

from __future__ import annotations

from gradwire.wire.reasons import Reason
from gradwire_server.errors import JobError


class Extent:
    """The rows of one job, known to all of its connections."""

    def __init__(self) -> None:
        self._least = 0
        self._most: int | None = None
        self._reason = Reason.PAYLOAD_MISSING
        self._why = ""

    def reaches(self, rows: int) -> None:
        """Elements came that lie within the first `rows` rows, and in the last.

        Raises:
            JobError: The job has no such row.
        """
        self._least = max(self._least, rows)
        self._check()

    def ends(self, rows: int, reason: Reason, why: str) -> None:
        """The job has at most that many rows.

        Args:
            rows: How many.
            reason: What it is if there are more.
            why: How that is known, for people.

        Raises:
            JobError: There are more.
        """
        if self._most is None or rows < self._most:
            self._most, self._reason, self._why = rows, reason, why
        self._check()

    def _check(self) -> None:
        if self._most is not None and self._least > self._most:
            raise JobError(
                self._reason,
                f"{self._why}, but elements of row {self._least - 1} came",
                field="end.m",
            )
