"""Copies of arrays between GPU memory and host memory.

No library is imported to recognize its arrays, because the arrays' owner has imported
it. Copies run after the work that the caller has queued on the library's current
stream, and are complete on return.
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
"""DLPack device types with memory that the host can read: CPU, and host memory pinned
by CUDA or ROCm."""


@dataclass(slots=True)
class HostCopies:
    """Size and time of one job's copies between GPUs and host memory."""

    size_bytes: int = 0
    seconds: float = 0.0

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Count the time in this context as copying."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - began

    def told(self, receipt: Receipt) -> Receipt:
        """Return the receipt with the size and time of the copies."""
        if not self.size_bytes:
            return receipt
        return replace(
            receipt, host_copy_bytes=self.size_bytes, host_copy_s=self.seconds
        )


def is_torch_tensor(value: object) -> bool:
    """Return whether a value is a PyTorch tensor."""
    return _is(value, "torch", "Tensor")


def is_cupy_array(value: object) -> bool:
    """Return whether a value is a CuPy array."""
    return _is(value, "cupy", "ndarray")


def is_on_device(value: object) -> bool:
    """Return whether an array is in memory that the host cannot read."""
    if isinstance(value, np.ndarray):
        return False
    if is_torch_tensor(value):
        return bool(value.device.type != "cpu")  # type: ignore[attr-defined]
    try:
        kind = value.__dlpack_device__()[0]  # type: ignore[attr-defined]
    except Exception:  # noqa: BLE001
        # Without the method, or any exception of a foreign type's method.
        return False
    return kind not in _IN_HOST_MEMORY


def to_host(value: Any) -> Any:
    """Copy an array from a GPU to host memory. A PyTorch tensor remains a tensor.

    Raises:
        Exception: Any exception of the array's library.
    """
    if is_torch_tensor(value):
        return value.detach().cpu()
    if is_cupy_array(value):
        return value.get()
    try:
        # The array API standard's request for a copy on the CPU.
        return np.from_dlpack(value, device="cpu", copy=True)
    except BufferError:
        # NumPy does not support bfloat16 here, but JAX arrays convert themselves.
        if not hasattr(value, "__array__"):
            raise
        return np.asarray(value)


def dtype_name(value: Any) -> str:
    """Return NumPy's name of the dtype of a CuPy array or a PyTorch tensor."""
    return str(value.dtype).removeprefix("torch.")


def to_device(array: Array, value: Any) -> None:
    """Copy an array from host memory to a CuPy array or a PyTorch tensor.

    Args:
        array: C-contiguous, with the shape and dtype of `value`.
        value: The destination, of any memory layout.
    """
    if is_torch_tensor(value):
        value.copy_(as_torch(array))
        return
    cupy = sys.modules["cupy"]
    with value.device:
        value[...] = cupy.asarray(array)
        cupy.cuda.get_current_stream().synchronize()


def as_torch(array: Array) -> Any:
    """Return a PyTorch tensor on the CPU that shares the memory of an array."""
    torch = sys.modules["torch"]
    dtype = Dtype.of(array.dtype)
    if dtype.is_numpys_own:
        return torch.from_numpy(array)
    # PyTorch only accepts NumPy's built-in dtypes.
    raw = torch.from_numpy(array.view(f"i{dtype.itemsize}"))
    return raw.view(getattr(torch, dtype.label))


def _is(value: object, library: str, kind: str) -> bool:
    found = getattr(sys.modules.get(library), kind, None)
    return found is not None and isinstance(value, found)
