"""The array library of results: that of the operands.

PyTorch's tensors give tensors, CuPy's arrays give CuPy arrays, and all other operands
give NumPy arrays. No library is imported: the operands' owner has imported it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gradwire._api.errors import InputError
from gradwire._api.types import Array
from gradwire._arrays.device_copy import (
    HostCopies,
    as_torch,
    is_cupy_array,
    is_torch_tensor,
)


@dataclass(frozen=True, slots=True)
class ResultLibrary:
    """A library other than NumPy, and the device of results."""

    is_torch: bool
    """PyTorch; else CuPy."""

    device: Any
    """The library's object for the device; None: the CPU."""

    def converted(self, array: Array, copies: HostCopies) -> Any:
        """Return a result as an array of the library.

        Args:
            array: C-contiguous. A tensor on the CPU shares its memory.
            copies: Counts the copy to a device.
        """
        if self.device is None:
            return as_torch(array)
        with copies.copying():
            if self.is_torch:
                # Complete on return, as the memory is not pinned.
                result = as_torch(array).to(self.device)
            else:
                cupy = sys.modules["cupy"]
                with self.device:
                    result = cupy.asarray(array)
                    # The array's memory may be reused from here on.
                    cupy.cuda.get_current_stream().synchronize()
        copies.size_bytes += array.nbytes
        return result


def library_of(operands: Iterable[object]) -> ResultLibrary | None:
    """Return the library of results; None: NumPy.

    Args:
        operands: The operands that are needed. One tensor of PyTorch among them is
            enough for tensors, else one CuPy array for CuPy arrays. The first one on
            a GPU decides the device.
    """
    if "torch" not in sys.modules and "cupy" not in sys.modules:
        return None
    given = list(operands)
    if tensors := [each for each in given if is_torch_tensor(each)]:
        devices: list[Any] = [each.device for each in tensors]  # type: ignore[attr-defined]
        on_device = (device for device in devices if device.type != "cpu")
        return ResultLibrary(is_torch=True, device=next(on_device, None))
    for each in given:
        if is_cupy_array(each):
            return ResultLibrary(is_torch=False, device=each.device)  # type: ignore[attr-defined]
    return None


def require_no_graph(operands: Iterable[tuple[str, object]]) -> None:
    """Check that autograd does not expect to differentiate a result.

    A result has no graph. Training would go on, without the gradients of the operands.

    Args:
        operands: Names and values.

    Raises:
        InputError: A tensor requires grad, and grad mode is on.
    """
    for name, value in operands:
        if not is_torch_tensor(value) or not value.requires_grad:  # type: ignore[attr-defined]
            continue
        if sys.modules["torch"].is_grad_enabled():
            raise InputError(
                f"{name} requires grad, but y would have no autograd graph: pass"
                f" {name}.detach(), or call forward under torch.no_grad(); to train,"
                " use gradwire.torch"
            )
