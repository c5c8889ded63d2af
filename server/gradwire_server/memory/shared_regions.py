"""Memory shared with clients on the same host.

A region is a file without a name (memfd_create(2)) and with a sealed size: if a client
could shrink it, the server's next access would fault. Its pages are allocated at
creation, so that no later write runs out of memory. Only a client that knows its token
can use it for jobs.
"""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
import secrets
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.limits import MAX_INT64, MIB
from gradwire_server.admission.controller import Admission
from gradwire_server.admission.quota import CALL_BYTES, busy
from gradwire_server.errors import JobError
from gradwire_server.memory.host_proof import HostProof
from gradwire_server.observability.figures import RegionFigures

MAX_REGIONS = 256
"""Most regions at once. Each takes two of the process's file descriptors, and
connections need some too."""

_MAX_OF_TENANT = MAX_REGIONS // 4
"""Most regions of one tenant, with authentication."""

_SPARE_FRACTION = 1 / 8
"""A tenant's regions leave at least one eighth of the memory for its open calls,
because the jobs that use the regions are calls too."""

COOKIE_BYTES = 32
"""Random bytes that prove to a client that it has opened the right file."""

_PIECE_BYTES = 64 * MIB
"""Bytes to allocate at a time: the kernel clears them in about 0.1 s and cannot be
interrupted."""

Pin: TypeAlias = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.uint8]]

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Region:
    """Memory mapped by both the server and a client.

    Args:
        size_bytes: Its size, a multiple of the page size.
        pin: Pins the memory (`Backend.pin`).
        tenant: Its owner.
    """

    def __init__(self, size_bytes: int, pin: Pin, tenant: str = "") -> None:
        self.size_bytes = size_bytes
        self.tenant = tenant
        self._pin = pin
        self.token = secrets.token_urlsafe(24)
        self.cookie = secrets.token_bytes(COOKIE_BYTES)
        self.fd = os.memfd_create(
            "gradwire-region", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        )
        try:
            os.ftruncate(self.fd, size_bytes)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(self.fd)
            raise
        self.memory: npt.NDArray[np.uint8] = np.empty(0, np.uint8)
        self._users = 0
        self._unused = asyncio.Event()
        self._unused.set()

    async def take_pages(self) -> None:
        """Allocate the region's pages and map them.

        Raises:
            OSError: The machine does not have enough memory.
        """
        given_up = threading.Event()
        loop = asyncio.get_running_loop()
        taking = loop.run_in_executor(None, self._take_pages, given_up)
        # Even if this task is cancelled repeatedly, the region counts and its
        # descriptor stays open for as long as the thread allocates pages.
        cancelled: asyncio.CancelledError | None = None
        while not taking.done():
            try:
                await asyncio.wait([taking])
            except asyncio.CancelledError as error:
                cancelled = error
                given_up.set()
        if cancelled is not None:
            taking.exception()  # or asyncio logs that it was never retrieved
            raise cancelled
        taking.result()

    def _take_pages(self, given_up: threading.Event) -> None:
        """Allocate the pages and map them; runs in an executor's thread."""
        _allocate(self.fd, self.size_bytes, given_up)
        if given_up.is_set():
            return
        memory = np.frombuffer(mmap.mmap(self.fd, self.size_bytes), np.uint8)
        memory[:COOKIE_BYTES] = np.frombuffer(self.cookie, np.uint8)
        self.memory = self._pin(memory)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Keep the region's memory within this context, even if it is closed."""
        self._users += 1
        self._unused.clear()
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._unused.set()

    async def close(self) -> None:
        """Free the memory once the last job that uses it has ended."""
        os.close(self.fd)
        await self._unused.wait()
        last, self.memory = [self.memory], np.empty(0, np.uint8)
        # In a thread, which goes on even if this task is cancelled: the kernel
        # frees pages as slowly as it allocates them.
        await asyncio.get_running_loop().run_in_executor(None, last.clear)


class Regions:
    """The open regions of one server.

    Args:
        admission: The admission control, for the regions' memory.
        pin: Pins shared memory (`Backend.pin`).

    Attributes:
        host_proof: Tells clients on this host from others.
    """

    def __init__(self, admission: Admission, pin: Pin) -> None:
        self.host_proof = HostProof()
        self._admission = admission
        self._pin = pin
        self._open: dict[str, Region] = {}
        self._counts: Counter[str] = Counter()
        """Regions of each tenant, including unfinished ones."""

    def figures(self) -> RegionFigures:
        """Return what is shared now."""
        sizes = [region.size_bytes for region in self._open.values()]
        return RegionFigures(len(sizes), sum(sizes))

    @asynccontextmanager
    async def open(self, size_bytes: int, tenant: str = "") -> AsyncIterator[Region]:
        """Hold a region of a tenant's within this context.

        Raises:
            JobError: The size is invalid, or larger than this server can ever hold; or
                there is no memory or descriptor for the region now.
        """
        if not 0 < size_bytes < MAX_INT64 - mmap.PAGESIZE:
            raise JobError(
                Reason.OPTION_INVALID,
                f"size_bytes is {size_bytes}: expected at least 1",
                field="size_bytes",
            )
        size_bytes = -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        most = self._admission.max_calls_bytes(tenant)
        spare = max(CALL_BYTES, int(most * _SPARE_FRACTION))
        if size_bytes + CALL_BYTES + spare > most:
            raise JobError(
                Reason.JOB_TOO_LARGE,
                f"the region would hold {size_bytes} bytes: this server has {most}",
                field="size_bytes",
            )
        self._require_descriptors(tenant)
        with self._admission.call(size_bytes, tenant, spare_bytes=spare):
            self._counts[tenant] += 1
            try:
                async with self._opened(size_bytes, tenant) as region:
                    yield region
            finally:
                self._counts[tenant] -= 1
                self._counts += Counter()  # forgets tenants that have none

    @contextmanager
    def used(self, tokens: Sequence[str], tenant: str = "") -> Iterator[list[Region]]:
        """Hold the regions with these tokens within this context.

        Raises:
            JobError: A token names no open region, or another tenant's.
        """
        with ExitStack() as stack:
            found = []
            for position, token in enumerate(tokens):
                region = self._open.get(token)
                if region is None:
                    raise JobError(
                        Reason.REGION_UNKNOWN,
                        f"job.regions[{position}].token names no open region of this "
                        f"server: it was closed, or it is another server's",
                        field=f"job.regions[{position}].token",
                    )
                if region.tenant != tenant:
                    raise JobError(
                        Reason.NOT_ALLOWED,
                        f"job.regions[{position}].token names a region of another "
                        f"tenant",
                        field=f"job.regions[{position}].token",
                    )
                stack.enter_context(region.used())
                found.append(region)
            yield found

    def _require_descriptors(self, tenant: str) -> None:
        count = self._counts.total()
        if count >= MAX_REGIONS:
            raise busy(f"{count} regions are open, of at most {MAX_REGIONS}", "regions")
        own = self._counts[tenant]
        if tenant and own >= _MAX_OF_TENANT:
            raise busy(
                f"{own} regions of your tenant are open, of at most {_MAX_OF_TENANT}",
                "regions",
            )

    @asynccontextmanager
    async def _opened(self, size_bytes: int, tenant: str) -> AsyncIterator[Region]:
        try:
            region = Region(size_bytes, self._pin, tenant)
        except OSError as error:
            raise busy("the process has no descriptors left", "regions") from error
        try:
            try:
                await region.take_pages()
            except OSError as error:
                raise busy(
                    f"the machine has no {size_bytes} bytes to share", "memory"
                ) from error
            self._open[region.token] = region
            yield region
        finally:
            self._open.pop(region.token, None)
            await region.close()


def _allocate(fd: int, size_bytes: int, given_up: threading.Event) -> None:
    for first in range(0, size_bytes, _PIECE_BYTES):
        if given_up.is_set():
            return
        os.posix_fallocate(fd, first, min(_PIECE_BYTES, size_bytes - first))
