"""The threads that share the work of a row block on the CPU.

Each thread calls single-threaded BLAS. BLAS's own threads split every product evenly
and spin while they wait for each other. So one core that is briefly busy, for example
with the network, delays all of them. Here, a free thread takes the next piece. Results
do not depend on the number of threads.
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
        threads: Number of threads, including the calling one.
        niceness: Niceness of the threads, added to the process's. Threads that
            transfer messages and answer small calls then have priority.
    """

    def __init__(self, threads: int, niceness: int = 0) -> None:
        self.count = threads
        # A thread starts with the niceness of its creator, which may be the device
        # worker's thread. So the niceness is set in every thread.
        self._niceness = niceness and min(_own_niceness() + niceness, 19)
        self._pool = ThreadPoolExecutor(
            max(threads - 1, 1), "gradwire-worker", self.enter
        )

    def enter(self) -> None:
        """Make the calling thread one of the worker threads."""
        np.seterr(all="ignore")
        # On Linux, every thread has its own niceness.
        if self._niceness and sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, 0, self._niceness)

    def close(self) -> None:
        """End the helper threads."""
        self._pool.shutdown()

    def run(self, pieces: Sequence[Piece], *, inline: bool = False) -> None:
        """Run all pieces, in any order, and wait for them.

        Args:
            pieces: The pieces of work.
            inline: Whether the calling thread runs them without the helpers.

        Raises:
            Exception: An exception of a piece.
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
    """A limit of BLAS's threads."""

    def restore_original_limits(self) -> None:
        """Remove the limit."""


def limit_blas() -> BlasLimit | None:
    """Limit BLAS to one thread per call, in the whole process.

    Returns:
        The limit; None if threadpoolctl is not installed (it comes with the extra
        `server`).
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
