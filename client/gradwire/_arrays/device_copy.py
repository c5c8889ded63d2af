"""Arrays in a GPU's memory: copied to host memory to be sent, and back.

Which library an array is of is found out without importing any: its owner has.
The copies wait for what the caller has queued on the library's current stream,
and are done when they return.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gradwire._api.types import Array, Receipt
from gradwire_protocol.dtypes import Dtype

_IN_HOST_MEMORY = frozenset({1, 3, 11})
"""DLPack's kinds of device whose memory the host reads: the CPU, and what CUDA
and ROCm have pinned of its memory."""


@dataclass(slots=True)
class HostCopies:
    """What was copied between a GPU's memory and the host's, for one job."""

    size_bytes: int = 0
    seconds: float = 0.0

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Counts the time within as copying."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - began

    def told(self, receipt: Receipt) -> Receipt:
        """The receipt, which knows of the copies."""
        if not self.size_bytes:
            return receipt
        return replace(
            receipt, host_copy_bytes=self.size_bytes, host_copy_s=self.seconds
        )


def is_torch_tensor(value: object) -> bool:
    """Whether it is a PyTorch tensor."""
    return _is(value, "torch", "Tensor")


def is_cupy_array(value: object) -> bool:
    """Whether it is a CuPy array."""
    return _is(value, "cupy", "ndarray")


def is_on_device(value: object) -> bool:
    """Whether an array's elements are where the host cannot read them."""
    if isinstance(value, np.ndarray):
        return False
    if is_torch_tensor(value):
        return bool(value.device.type != "cpu")  # type: ignore[attr-defined]
    try:
        kind = value.__dlpack_device__()[0]  # type: ignore[attr-defined]
    except Exception:  # noqa: BLE001
        # It has none, or is a foreign type whose method may raise anything.
        return False
    return kind not in _IN_HOST_MEMORY


def to_host(value: Any) -> Any:
    """An array of a GPU in host memory; a PyTorch tensor stays one.

    Raises:
        Exception: Whatever its library raises where it cannot.
    """
    if is_torch_tensor(value):
        return value.detach().cpu()
    if is_cupy_array(value):
        return value.get()
    try:
        # What the array API standard says: ask for a copy on the CPU.
        return np.from_dlpack(value, device="cpu", copy=True)
    except BufferError:
        # NumPy takes no bfloat16 that way; JAX's arrays give a copy all the same.
        if not hasattr(value, "__array__"):
            raise
        return np.asarray(value)


def dtype_name(value: Any) -> str:
    """The element type of a CuPy array or a PyTorch tensor, as NumPy names it."""
    return str(value.dtype).removeprefix("torch.")


def to_device(array: Array, value: Any) -> None:
    """Copies from host memory into a CuPy array or a PyTorch tensor.

    Args:
        array: C-contiguous, of the shape and dtype of `value`.
        value: Of any layout.
    """
    if is_torch_tensor(value):
        torch = sys.modules["torch"]
        dtype = Dtype.of(array.dtype)
        if dtype.is_numpys_own:
            source = torch.from_numpy(array)
        else:  # PyTorch takes only NumPy's own dtypes
            raw = array.view(f"i{dtype.itemsize}")
            source = torch.from_numpy(raw).view(getattr(torch, dtype.label))
        value.copy_(source)
        return
    cupy = sys.modules["cupy"]
    with value.device:
        value[...] = cupy.asarray(array)
        cupy.cuda.get_current_stream().synchronize()


def _is(value: object, library: str, kind: str) -> bool:
    found = getattr(sys.modules.get(library), kind, None)
    return found is not None and isinstance(value, found)
