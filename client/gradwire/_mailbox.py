"""Messages between threads: a bounded queue that can be closed."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """A queue whose writers wait while it is full.

    Args:
        capacity: Says how many items may wait in it.
    """

    def __init__(self, capacity: Callable[[], int]) -> None:
        self._capacity = capacity
        self._items: deque[T] = deque()
        self._closed = False
        self._changed = threading.Condition()

    def put(self, item: T) -> bool:
        """Add an item; False where the box was closed and it was not."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or len(self._items) < self._capacity()
            )
            if self._closed:
                return False
            self._items.append(item)
            self._changed.notify_all()
            return True

    def get(self, timeout_s: float | None = None) -> T | None:
        """The oldest item; None once the box is closed and empty, or too late."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._items, timeout_s)
            if not self._items:
                return None
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def close(self) -> None:
        """Take no more items; those that are there can still be had."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
