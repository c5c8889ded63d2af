"""A job on an asynchronous device.

While a row block is computed, the next one is copied to the device, and the previous
one is copied back:

    up:       x0 dy0 | x1 dy1 | x2 dy2 | ...
    compute:           y0 dx0 dw | y1 dx1 dw | ...
    down:                          y0 dx0 | y1 dx1 | ...

Each block is in a slot of the job's device memory, and slots are used in turn. A
block's upload waits for the products of the previous block in its slot. Its products
wait for its upload, and for the download of that previous block. Its download waits for
its products. All these waits are on the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from gradwire_protocol.job_spec import JobSpec
from gradwire_protocol.matrices import Matrix
from gradwire_server.backends import products
from gradwire_server.backends.async_device import gemm
from gradwire_server.backends.async_device.device import (
    Allocate,
    Device,
    Events,
    Stream,
    begun,
)
from gradwire_server.backends.async_device.gemm import Compute, DeviceMatrix
from gradwire_server.backends.async_device.kept_memory import DeviceArray
from gradwire_server.backends.async_device.layout import (
    JobMatrices,
    SumMatrices,
    make_layout,
)
from gradwire_server.backends.base import (
    Array,
    RowBlock,
    Sums,
    Times,
    Wait,
)
from gradwire_server.backends.kept_memory import KeptArray


class DeviceJob:
    """A job on a device: its memory there, and the order of its work.

    Args:
        spec: The job.
        block_rows: Most rows of a row block.
        pipeline_depth: Most row blocks in progress.
        device: The device.
        times: Counts the times of the stages, by the device's clock.
        empty: Allocates host memory for the sums, if `sums` is None.
        sums: Memory for the sums, each in its dtype on the wire.
        kept: Operands that are arrays of a session on the device, whole.

    Raises:
        MemoryError: The device has not enough memory.
    """

    def __init__(
        self,
        spec: JobSpec,
        block_rows: int,
        pipeline_depth: int,
        device: Device,
        *,
        times: Times,
        empty: Allocate,
        sums: Sums | None = None,
        kept: Mapping[Matrix, KeptArray] | None = None,
    ) -> None:
        self._spec = spec
        self._block_rows = block_rows
        self._device = device
        self._times = times
        self._empty = empty
        self._results = sums
        self._compute = Compute.of(spec.dtype, allow_tf32=spec.allow_tf32)
        layout = make_layout(spec, block_rows, pipeline_depth)
        with device.errors():
            self._memory = device.allocate(layout.size_bytes)
        self._matrices = JobMatrices(
            spec, layout, self._memory.address, _addresses(kept or {})
        )
        self._sums = self._matrices.sums()
        self._slots: list[Events | None] = [None] * len(layout.slots)
        """Events of the block in each slot, until it was waited for."""
        self._blocks = 0
        self._begun_sums = False
        """Whether there are sums, of row blocks or those that were taken."""

    def take_w(self, w: Array) -> None:
        """Copy W, shape (n, k), to the device."""
        on_device = self._matrices.w
        if on_device is not None:
            self._upload_whole(w, on_device)

    def take_sums(self, sums: Sums) -> None:
        """Copy sums to the device, in the place of its own."""
        self._begun_sums = True
        for matrix, on_device in self._sums.items():
            if on_device.total.size:
                self._upload_whole(
                    sums[matrix], on_device.total, after_blocks=bool(self._blocks)
                )

    def copy_sums(self, out: Sums) -> None:
        """Copy the sums over all started blocks from the device."""
        sums = self._sums_on_device(out)
        if not sums:
            return
        with begun(self._device) as events:
            self._device.record(Stream.COMPUTE, events.computed)
            self._device.wait(Stream.D2H, events.computed)
            self._device.record(Stream.D2H, events.download_begun)
            for matrix, on_device in sums.items():
                self._device.download(on_device.total.address, out[matrix])
            self._device.record(Stream.D2H, events.done)
            # The next block, which adds to them, starts after this.
            self._device.synchronize(events.done)
            self._times.from_device_s += self._device.elapsed_s(
                events.download_begun, events.done
            )
            self._device.release_events(events)

    def restart_sums(self) -> None:
        """Begin the sums anew."""
        self._begun_sums = False

    def compute_block(self, block: RowBlock) -> Wait | None:
        """Start a row block: copy it, compute, and copy its results."""
        if not (self._slots and block.rows and self._spec.n and self._spec.k):
            # Empty sums, which cuBLAS does not support.
            for result in (block.y, block.dx):
                if result is not None:
                    result.fill(0)
            block = replace(block, y=None, dx=None)
        if not (self._slots and block.rows):
            return None
        ones = self._matrices.ones(self._block_rows)
        if ones is not None and not self._blocks:
            self._upload_whole(np.ones(ones.rows, ones.dtype.numpy), ones)
        number = self._blocks % len(self._slots)
        with begun(self._device) as events:
            self._upload(number, block, events)
            self._multiply(number, block, events)
            self._download(number, block, events)
        self._slots[number] = events
        self._blocks += 1
        self._begun_sums = True
        return partial(self._wait, number, block, events)

    def kept_sums(self) -> Mapping[Matrix, KeptArray]:
        """Return the sums that stay, rounded once from the accumulator."""
        kept = {matrix: self._sums[matrix] for matrix in self._spec.into}
        with begun(self._device) as events:
            self._device.record(Stream.COMPUTE, events.compute_begun)
            for on_device in kept.values():
                if not self._begun_sums:
                    leaves = on_device.leaves
                    size_bytes = leaves.size * leaves.dtype.itemsize
                    self._device.clear(leaves.address, size_bytes)
                elif on_device.total.size:
                    self._round(on_device)
            self._device.record(Stream.COMPUTE, events.computed)
            self._device.synchronize(events.computed)
            self._times.computing_s += self._device.elapsed_s(
                events.compute_begun, events.computed
            )
            self._device.release_events(events)
        return {matrix: DeviceArray.of(each.leaves) for matrix, each in kept.items()}

    def finish(self) -> Sums:
        """Return the sums to send, rounded once from the accumulator."""
        results = self._results or {
            matrix: self._room(matrix)
            for matrix in self._sums
            if matrix not in self._spec.into
        }
        sums = self._sums_on_device(results)
        if not sums:
            return results
        with begun(self._device) as events:
            self._device.record(Stream.COMPUTE, events.compute_begun)
            for on_device in sums.values():
                self._round(on_device)
            self._device.record(Stream.COMPUTE, events.computed)
            self._device.wait(Stream.D2H, events.computed)
            self._device.record(Stream.D2H, events.download_begun)
            for matrix, on_device in sums.items():
                self._device.download(on_device.leaves.address, results[matrix])
            self._device.record(Stream.D2H, events.done)
            self._device.synchronize(events.done)
            self._times.computing_s += self._device.elapsed_s(
                events.compute_begun, events.computed
            )
            self._times.from_device_s += self._device.elapsed_s(
                events.download_begun, events.done
            )
            self._device.release_events(events)
        return results

    def close(self) -> None:
        """Release the job's memory on the device."""
        self._memory.free()

    def _round(self, sum_: SumMatrices) -> None:
        if sum_.leaves is not sum_.total:
            self._device.convert(sum_.total, sum_.leaves, add=False)

    def _sums_on_device(self, out: Sums) -> dict[Matrix, SumMatrices]:
        """The sums on the device; those of nothing are written to `out` as zeros."""
        sums = {}
        for matrix in out:
            on_device = self._sums[matrix]
            if self._begun_sums and on_device.total.size:
                sums[matrix] = on_device
            else:
                out[matrix].fill(0)
        return sums

    def _room(self, matrix: Matrix) -> Array:
        spec, dtype = self._spec, self._spec.results[matrix]
        with self._device.errors():
            memory = self._empty(spec.size_bytes(matrix))
        return memory.view(dtype.numpy).reshape(matrix.shape(0, spec.n, spec.k))

    def _upload_whole(
        self, array: Array, to: DeviceMatrix, *, after_blocks: bool = False
    ) -> None:
        """Copy a matrix without row blocks to the device, and wait."""
        with begun(self._device) as events:
            if after_blocks:
                self._device.record(Stream.COMPUTE, events.computed)
                self._device.wait(Stream.H2D, events.computed)
            self._device.record(Stream.H2D, events.upload_begun)
            self._device.upload(array, to.address)
            self._device.record(Stream.H2D, events.uploaded)
            # The source's memory may be released at any time after this job ends.
            self._device.synchronize(events.uploaded)
            self._times.to_device_s += self._device.elapsed_s(
                events.upload_begun, events.uploaded
            )
            self._device.release_events(events)

    def _upload(self, slot: int, block: RowBlock, events: Events) -> None:
        before = self._slots[slot]
        if before is not None:
            self._device.wait(Stream.H2D, before.computed)
        self._device.record(Stream.H2D, events.upload_begun)
        for matrix, array in ((Matrix.X, block.x), (Matrix.DY, block.dy)):
            on_device = self._matrices.received(slot, matrix, block)
            if on_device is not None and array is not None:
                self._device.upload(array, on_device.address)
        self._device.record(Stream.H2D, events.uploaded)

    def _multiply(self, slot: int, block: RowBlock, events: Events) -> None:
        self._device.wait(Stream.COMPUTE, events.uploaded)
        before = self._slots[slot]
        if before is not None:
            self._device.wait(Stream.COMPUTE, before.done)
        self._device.record(Stream.COMPUTE, events.compute_begun)
        for source, to in self._matrices.realigned(slot, block):
            size_bytes = source.size * source.dtype.itemsize
            self._device.copy(source.address, to.address, size_bytes)
        of_rows = partial(self._matrices.of_rows, slot, block=block)
        products.compute_block(
            _Products(
                self._device, self._compute, self._matrices, first=not self._begun_sums
            ),
            w=self._matrices.w,
            x=of_rows(matrix=Matrix.X),
            dy=of_rows(matrix=Matrix.DY),
            y=of_rows(matrix=Matrix.Y),
            dx=of_rows(matrix=Matrix.DX),
            ones=self._matrices.ones(block.rows),
            sums=self._sums,
        )
        self._device.record(Stream.COMPUTE, events.computed)

    def _download(self, slot: int, block: RowBlock, events: Events) -> None:
        self._device.wait(Stream.D2H, events.computed)
        self._device.record(Stream.D2H, events.download_begun)
        for matrix, array in ((Matrix.Y, block.y), (Matrix.DX, block.dx)):
            on_device = self._matrices.of_rows(slot, matrix, block)
            if on_device is not None and array is not None:
                self._device.download(on_device.address, array)
        self._device.record(Stream.D2H, events.done)

    def _wait(self, slot: int, block: RowBlock, events: Events) -> None:
        """Wait for a block. The argument `block` keeps its arrays alive until then."""
        del block
        device, times = self._device, self._times
        with device.errors():
            device.synchronize(events.done)
            times.to_device_s += device.elapsed_s(events.upload_begun, events.uploaded)
            times.computing_s += device.elapsed_s(events.compute_begun, events.computed)
            times.from_device_s += device.elapsed_s(events.download_begun, events.done)
        if self._slots[slot] is events:
            self._slots[slot] = None
        device.release_events(events)


class _Products:
    """Products of a row block on a device."""

    def __init__(
        self, device: Device, compute: Compute, matrices: JobMatrices, *, first: bool
    ) -> None:
        self._device = device
        self._compute = compute
        self._full = Compute.of(matrices.spec.dtype, allow_tf32=False)
        self._matrices = matrices
        self._first = first

    def multiply(self, a: DeviceMatrix, b: DeviceMatrix, out: DeviceMatrix) -> None:
        computed = self._computed(a, out)
        self._device.multiply(gemm.multiply(a, b, computed, self._compute))
        self._round(computed, out)

    def multiply_transposed(
        self, a: DeviceMatrix, b: DeviceMatrix, out: DeviceMatrix
    ) -> None:
        computed = self._computed(a, out)
        self._device.multiply(gemm.multiply_transposed(a, b, computed, self._compute))
        self._round(computed, out)

    def accumulate_transposed(
        self, a: DeviceMatrix, b: DeviceMatrix, out: SumMatrices
    ) -> None:
        # Another kernel adds the share to the sum: cuBLAS (with beta = 1) may round
        # more than once, and a client that adds shares would get other bits.
        widens = out.share.dtype != out.total.dtype
        share = out.total if self._first and not widens else out.share
        # TF32 would round what ones add up, and is no faster.
        with_ones = a == self._matrices.ones(a.rows)
        compute = self._full if with_ones else self._compute
        self._device.multiply(gemm.transposed_multiply(a, b, share, compute))
        if widens:
            self._device.convert(share, out.total, add=not self._first)
        elif share is not out.total:
            self._device.add(share, out.total)

    def _computed(self, a: DeviceMatrix, out: DeviceMatrix) -> DeviceMatrix:
        """Return the memory in which to compute a product for `out`."""
        offset = self._matrices.layout.unrounded
        if offset is None or gemm.computes_into(a.dtype, out.dtype):
            return out
        address = self._matrices.address + offset
        return DeviceMatrix(address, out.rows, out.columns, a.dtype.sums_in)

    def _round(self, computed: DeviceMatrix, out: DeviceMatrix) -> None:
        if computed is not out:
            self._device.convert(computed, out, add=False)


def _addresses(kept: Mapping[Matrix, KeptArray]) -> dict[Matrix, int]:
    """The addresses of a session's arrays on the device."""
    addresses = {}
    for matrix, array in kept.items():
        if not isinstance(array, DeviceArray):
            raise TypeError(f"{matrix.label} is not on the device")
        addresses[matrix] = array.address
    return addresses
