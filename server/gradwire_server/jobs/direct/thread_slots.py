"""A ring of slots for threads."""

from __future__ import annotations

import threading

from gradwire_server.jobs.stream.slots import Ring
from gradwire_server.transports.data_plane.thread_side import Stopped


class ThreadSlots(Ring):
    """A ring for threads.

    Args:
        count: As for `Ring`.
        first: As for `Ring`.
        lock: The job's lock.
    """

    def __init__(self, count: int, first: int, lock: threading.Lock) -> None:
        super().__init__(count, first)
        self._freed = threading.Condition(lock)
        self._stopped = False

    def wait_for(self, block: int) -> None:
        """Wait until the slot of `block` is free for it. The lock must not be held.

        Raises:
            Stopped: The job takes no more row blocks.
        """
        with self._freed:
            while not self.is_free_for(block):
                if self._stopped:
                    raise Stopped
                self._freed.wait()

    def release(self, block: int) -> None:
        """Free the slot of a block that was sent. The lock must be held."""
        super().release(block)
        self._freed.notify_all()

    def stop(self) -> None:
        """Let no thread wait any longer. The lock must be held."""
        self._stopped = True
        self._freed.notify_all()
