"""A device made of host memory, whose streams run as late and as oddly as may be.

Work on a stream is done in order; between streams there is no order but that
of marks, and nothing is done before somebody waits for it. Which stream goes on
next is drawn by chance, so that whatever a job has forgotten to wait for shows
in its results sooner or later. Products go through SciPy's BLAS with the letters
that cuBLAS would be given, on the addresses that it would be given.
"""

from __future__ import annotations

import ctypes
import random
import weakref
from collections import deque
from contextlib import contextmanager

import numpy as np
from scipy.linalg import blas

from gradwire_protocol.dtypes import Dtype
from gradwire_server.backends.async_device.device import PARTIAL_SUMS, Events, Stream
from gradwire_server.backends.base import empty_aligned
from gradwire_server.backends.numpy import updates
from gradwire_server.backends.row_blocks import ALIGNMENT


def at(address, size, dtype):
    """Elements at an address."""
    data = (ctypes.c_uint8 * (size * dtype.itemsize)).from_address(address)
    return np.frombuffer(data, dtype.numpy)


def of(matrix):
    """Elements of a matrix, in one dimension."""
    return at(matrix.address, matrix.size, matrix.dtype)


def run_gemm(gemm):
    """Does what cublasGemmEx does, on host memory."""

    def stored(address, ld, columns, dtype):
        return at(address, ld * columns, dtype).reshape(columns, ld).T

    shape_a = (gemm.k, gemm.m) if gemm.transa else (gemm.m, gemm.k)
    shape_b = (gemm.n, gemm.k) if gemm.transb else (gemm.k, gemm.n)
    sums_in = gemm.operands.sums_in
    assert gemm.lda >= shape_a[0]
    assert gemm.ldb >= shape_b[0]
    assert gemm.ldc >= gemm.m
    assert gemm.result in {gemm.operands, sums_in}
    a = stored(gemm.a, gemm.lda, shape_a[1], gemm.operands)[: shape_a[0]]
    b = stored(gemm.b, gemm.ldb, shape_b[1], gemm.operands)[: shape_b[0]]
    c = stored(gemm.c, gemm.ldc, gemm.n, gemm.result)[: gemm.m]
    run = blas.dgemm if sums_in is Dtype.FLOAT64 else blas.sgemm
    sums = np.array(c if gemm.beta else np.zeros_like(c), sums_in.numpy, order="F")
    with np.errstate(all="ignore"):
        c[...] = run(
            gemm.alpha,
            np.asarray(a, sums_in.numpy, order="F"),
            np.asarray(b, sums_in.numpy, order="F"),
            gemm.beta,
            sums,
            gemm.transa,
            gemm.transb,
        ).astype(gemm.result.numpy)


class _Mark:
    def __init__(self):
        self.queued = 0
        self.reached = 0
        self.time = None


class _Memory:
    def __init__(self, device, size_bytes):
        self._device = device
        self._bytes = empty_aligned(size_bytes)
        self._bytes.fill(0xFF)  # NaN in every dtype
        self.size_bytes = size_bytes
        self.address = self._bytes.ctypes.data
        assert not size_bytes or self.address % ALIGNMENT == 0
        device.taken_bytes += size_bytes

    def free(self):
        if self._bytes.size:
            if self._device.alone:
                assert not any(self._device.queues.values()), "still in use"
            self._bytes.fill(0xFF)
            self._device.taken_bytes -= self.size_bytes
            self._bytes = self._bytes[:0].copy()


class SimulatedDevice:
    """`gradwire_server.backends.async_device.device.Device` without a device.

    Args:
        seed: Of the order of the streams.
        alone: Whether nothing is in flight when memory is freed.

    Attributes:
        uploads: The size of every copy to the device, in bytes.
        fail: Called with the name of each method that queues work; may raise the
            device's errors.
    """

    def __init__(self, seed=0, *, alone=True):
        self.alone = alone
        self.uploads = []
        self.fail = lambda method: None
        self._random = random.Random(seed)
        self.queues = {stream: deque() for stream in Stream}
        self.taken_bytes = 0
        self.marks_out = 0
        self.fail_at = None
        """How many more products there are before one fails."""
        self._clock = 0

    @contextmanager
    def errors(self):
        yield

    def allocate(self, size_bytes):
        self.fail("allocate")
        return _Memory(self, size_bytes)

    def events(self):
        self.marks_out += 1
        return Events(*(_Mark() for _ in range(6)))

    def release_events(self, events):
        assert not any(
            event.queued != event.reached
            for event in (getattr(events, name) for name in Events.__slots__)
        )
        self.marks_out -= 1

    def upload(self, source, to):
        self.fail("upload")
        self.uploads.append(source.nbytes)
        alive = weakref.ref(source)  # as for CUDA, to which it is an address
        assert source.flags.c_contiguous

        def copy():
            data = alive()
            assert data is not None, "gone before it was copied"
            at(to, data.size, Dtype.of(data.dtype))[...] = data.reshape(-1)

        self.queues[Stream.H2D].append(copy)

    def download(self, source, to):
        self.fail("download")
        alive = weakref.ref(to)
        assert to.flags.c_contiguous

        def copy():
            data = alive()
            assert data is not None, "gone before it was copied"
            data.reshape(-1)[...] = at(source, data.size, Dtype.of(data.dtype))

        self.queues[Stream.D2H].append(copy)

    def multiply(self, gemm):
        self.fail("multiply")
        # With others, cuBLAS may choose kernels of other bits.
        assert not any(address % ALIGNMENT for address in (gemm.a, gemm.b, gemm.c))
        assert gemm.m
        assert gemm.n
        assert gemm.k
        if self.fail_at is not None:
            self.fail_at -= 1
            if self.fail_at < 0:
                raise MemoryError("cuBLAS")
        self.queues[Stream.COMPUTE].append(lambda: run_gemm(gemm))

    def convert(self, source, to, *, add):
        def run():
            values = at(source.address, source.size, source.dtype)
            into = at(to.address, to.size, to.dtype)
            with np.errstate(all="ignore"):
                if add:
                    into += values
                else:
                    into[...] = values.astype(to.dtype.numpy)

        self.fail("convert")
        assert source.size == to.size
        assert not add or to.dtype is Dtype.FLOAT64
        self.queues[Stream.COMPUTE].append(run)

    def clear(self, address, size_bytes):
        self.fail("clear")
        self.queues[Stream.COMPUTE].append(
            lambda: ctypes.memset(address, 0, size_bytes)
        )

    def copy(self, source, to, size_bytes):
        self.fail("copy")
        assert abs(source - to) >= size_bytes, "overlapping"
        self.queues[Stream.COMPUTE].append(
            lambda: ctypes.memmove(to, source, size_bytes)
        )

    def add(self, source, to):
        def run():
            total = of(to)
            with np.errstate(all="ignore"):
                np.add(total, of(source), out=total)

        self.fail("add")
        assert (source.size, source.dtype) == (to.size, to.dtype)
        self.queues[Stream.COMPUTE].append(run)

    def sum_squares(self, source, to):
        def run():
            sums = at(to, PARTIAL_SUMS, Dtype.FLOAT64)
            parts = np.array_split(of(source), PARTIAL_SUMS)
            sums[...] = [updates.sum_of_squares(part) for part in parts]

        self.fail("sum_squares")
        assert source.size
        self.queues[Stream.COMPUTE].append(run)

    def update(self, update):
        def run():
            names = update.optimizer.states
            states = dict(zip(names, map(of, update.states), strict=True))
            updates.update(
                update.optimizer,
                of(update.p),
                of(update.g),
                states,
                update.made,
                scale=update.scale,
            )

        self.fail("update")
        self.queues[Stream.COMPUTE].append(run)

    def record(self, stream, event):
        event.queued += 1
        number = event.queued

        def reach():
            event.reached = number
            event.time = self._clock

        self.queues[stream].append(reach)

    def wait(self, stream, event):
        self.queues[stream].append((event, event.queued))

    def synchronize(self, event):
        number = event.queued
        while event.reached < number:
            self._go_on()

    def elapsed_s(self, begin, end):
        return (end.time - begin.time) / 1000

    def synchronize_all(self):
        while any(self.queues.values()):
            self._go_on()

    def _go_on(self):
        ready = [
            queue
            for queue in self.queues.values()
            if queue
            and not (isinstance(queue[0], tuple) and queue[0][0].reached < queue[0][1])
        ]
        assert ready, "deadlock"
        # One stream for a while, so that it gets far ahead of the others.
        queue = self._random.choice(ready)
        for _ in range(self._random.choice((1, 2, 20))):
            if not queue or isinstance(queue[0], tuple):
                break
            queue.popleft()()
            self._clock += 1
        else:
            return
        if queue and queue[0][0].reached >= queue[0][1]:
            queue.popleft()
