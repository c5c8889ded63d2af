"""The threads that share the work of a row block on the CPU.

Each calls BLAS with one thread of its own. BLAS's own threads split every
product evenly and wait for each other spinning, so that a core that is taken
away for a moment (by the network's threads) delays all of them; here who is
free takes the next piece. What is computed does not depend on how many there
are.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Protocol, TypeAlias

import numpy as np

try:
    from threadpoolctl import threadpool_info, threadpool_limits
except ImportError:
    threadpool_info = threadpool_limits = None

_log = logging.getLogger("gradwire_server")

Piece: TypeAlias = Callable[[], None]


class WorkerThreads:
    """A device worker's thread and its helpers.

    Args:
        threads: How many work, the calling one counted.
        niceness: By how much they are nicer than the process, so that those
            which move bytes and answer small calls need not wait for them.
    """

    def __init__(self, threads: int, niceness: int = 0) -> None:
        self.count = threads
        # Threads begin with the niceness of the one that starts them, which may
        # be the device worker's: so all of them are given the same.
        self._niceness = niceness and min(_own_niceness() + niceness, 19)
        self._pool = ThreadPoolExecutor(
            max(threads - 1, 1), "gradwire-worker", self.enter
        )

    def enter(self) -> None:
        """Makes the calling thread one that works."""
        np.seterr(all="ignore")
        # Linux gives every thread a niceness of its own.
        if self._niceness and sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, 0, self._niceness)

    def close(self) -> None:
        """Ends the helpers."""
        self._pool.shutdown()

    def run(self, pieces: Sequence[Piece], *, inline: bool = False) -> None:
        """Does the pieces, in any order, and returns when all are done.

        Args:
            pieces: What is to be done.
            inline: Whether the calling thread does it without the helpers.

        Raises:
            Exception: What a piece raised.
        """
        if inline:
            for piece in pieces:
                piece()
            return
        left = iter(pieces)
        lock = Lock()

        def work() -> None:
            while True:
                with lock:
                    piece = next(left, None)
                if piece is None:
                    return
                piece()

        helpers = min(self.count, len(pieces)) - 1
        done = [self._pool.submit(work) for _ in range(helpers)]
        try:
            work()
        finally:
            for each in done:
                each.result()


def _own_niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, 0)


class BlasLimit(Protocol):
    """A limit that can be lifted again."""

    def restore_original_limits(self) -> None:
        """Lifts it."""


def limit_blas() -> BlasLimit | None:
    """Limits BLAS to one thread a call, in the whole process.

    Returns:
        What lifts the limit; None where threadpoolctl, which knows how to
        tell each BLAS, is not installed (it comes with the extra `server`).
    """
    if threadpool_limits is None:
        _log.info("BLAS shares its own threads: install gradwire[server] to tune it")
        return None
    limit: BlasLimit = threadpool_limits(1, user_api="blas")
    return limit


_KERNEL_VARIABLES = (
    *("OPENBLAS_CORETYPE", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS"),
    *("BLIS_ARCH_TYPE", "NPY_DISABLE_CPU_FEATURES"),
)


def blas_kernel() -> str:
    """The processor that BLAS's kernels are written for, as ``Haswell``.

    BLAS chooses its kernels when it is loaded, by the processor or by an
    environment variable, and kernels differ in the last bits of a product. So
    the variables that are set are part of the text.
    """
    found = {
        library.get("architecture")
        for library in ([] if threadpool_info is None else threadpool_info())
        if library["user_api"] == "blas"
    }
    kernels = sorted(filter(None, found)) or ["unknown"]
    asked = [
        f"{name}={os.environ[name]}"
        for name in _KERNEL_VARIABLES
        if os.environ.get(name)
    ]
    return " ".join([*kernels, *asked])
