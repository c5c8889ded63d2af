"""Work that is done a little later."""

from __future__ import annotations

import threading
from collections.abc import Callable


def later(delay_s: float, work: Callable[[], object]) -> threading.Timer:
    """Do something in a thread after some seconds, unless the timer is cancelled.

    It does not keep the interpreter from ending.
    """
    timer = threading.Timer(delay_s, work)
    timer.daemon = True
    timer.start()
    return timer
