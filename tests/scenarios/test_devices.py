"""Arrays in a GPU's memory, as far as no GPU is needed to see it.

What stands for such arrays here lies in host memory and says that it does not:
the copies are real, the devices are not. tests/gpu has both.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import gradwire
from tests.scenarios import ways
from tests.support import oracle
from tests.support.serving import ServerProcess

NAMES = ("y", "dx", "dw")


class OnDevice:
    """As the array API says: what lies elsewhere is copied only when asked for."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(
        self,
        *,
        max_version: Any = None,
        dl_device: Any = None,
        copy: bool | None = None,
    ) -> Any:
        if dl_device != (1, 0) or copy is False:
            raise BufferError("not without a copy")
        return self._array.copy().__dlpack__(max_version=max_version)


class ReadableOnDevice(OnDevice):
    """As JAX has it: whoever asks for a NumPy array is given a copy, too."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        assert dtype is None
        return self._array.copy()


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch")


@pytest.fixture
def tensor(torch: Any) -> Any:
    """Makes tensors of what is given, which are said to be a GPU's."""

    class DeviceTensor(torch.Tensor):  # type: ignore[misc]
        @property
        def device(self) -> Any:
            return torch.device("cuda", 0)

    return lambda source: source.as_subclass(DeviceTensor)


def size_bytes(*arrays: Any) -> int:
    return sum(array.nbytes for array in arrays)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_operands_are_copied_and_the_receipt_says_so(caller: Any, dtype: str) -> None:
    operands = oracle.operands(150, 40, 30, dtype)
    expected = caller.gradients(*operands)
    assert expected.receipt.host_copy_bytes == 0
    assert expected.receipt.host_copy_s == 0
    result = caller.gradients(*map(OnDevice, operands))
    for name in NAMES:
        assert oracle.same_bits(getattr(result, name), getattr(expected, name))
    assert result.receipt.host_copy_bytes == size_bytes(*operands)
    assert result.receipt.host_copy_s > 0
    mixed = caller.gradients(OnDevice(operands[0]), *operands[1:])
    assert oracle.same_bits(mixed.dw, expected.dw)
    assert mixed.receipt.host_copy_bytes == operands[0].nbytes


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_what_dlpack_cannot_carry_is_copied_as_numpy_arrays_are(
    caller: Any, dtype: str
) -> None:
    """NumPy takes no bfloat16 from others."""
    operands = oracle.operands(150, 40, 30, dtype)
    expected = caller.gradients(*operands)
    result = caller.gradients(*map(ReadableOnDevice, operands))
    for name in NAMES:
        assert oracle.same_bits(getattr(result, name), getattr(expected, name))
    assert result.receipt.host_copy_bytes == size_bytes(*operands)


def test_float32_on_a_device_travels_in_half_the_bytes(streamer: Any) -> None:
    operands = oracle.operands(150, 40, 30)
    expected = streamer.gradients(*operands, wire_dtype="bfloat16")
    result = streamer.gradients(*map(OnDevice, operands), wire_dtype="bfloat16")
    for name in NAMES:
        assert oracle.same_bits(getattr(result, name), getattr(expected, name))


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_tensors_take_results_on_their_device(
    caller: Any, torch: Any, tensor: Any, dtype: str
) -> None:
    operands = oracle.operands(150, 40, 30, dtype)
    expected = caller.gradients(*operands)
    tensors = [
        tensor(torch.from_numpy(each.astype("f8")).to(getattr(torch, dtype)))
        for each in operands
    ]
    out = {
        "y": tensor(torch.empty((150, 30), dtype=getattr(torch, dtype))),
        # Of any layout: dX is transposed.
        "dx": tensor(torch.empty((40, 150), dtype=getattr(torch, dtype))).T,
        "dw": tensor(torch.empty((40, 30), dtype=getattr(torch, dtype))),
    }
    result = caller.gradients(*tensors, out=out)
    for name, array in out.items():
        assert getattr(result, name) is array
        here = np.asarray(getattr(expected, name).astype("f8"))
        assert torch.equal(
            torch.from_numpy(here), array.as_subclass(torch.Tensor).double()
        )
    copied = size_bytes(*operands, *expected)
    assert result.receipt.host_copy_bytes == copied


def test_a_tensor_that_cannot_take_a_result_is_refused(
    caller: Any, torch: Any, tensor: Any
) -> None:
    x, w, _ = oracle.operands(20, 10, 15)
    for out, says in (
        (torch.empty((15, 20)), r"out's y has shape \(15, 20\): expected \(20, 15\)"),
        (torch.empty((20, 15)).double(), "out's y is float64: expected float32"),
        (torch.empty((20, 15)).requires_grad_(), "out's y requires grad"),
    ):
        with pytest.raises(gradwire.InputError, match=says):
            caller.forward(x, w, out=tensor(out))
    one = tensor(torch.empty((20, 20)))
    x, w, dy = oracle.operands(20, 20, 20)
    with pytest.raises(
        gradwire.InputError, match="out's dx shares memory with out's y"
    ):
        caller.gradients(x, w, dy, out={"y": one, "dx": one})


def test_streamed_rows_are_copied(small_blocks: ServerProcess) -> None:
    x, w, dy = oracle.operands(600, 40, 30)
    with ways.STREAM.connect(small_blocks) as client:
        rows = [
            (OnDevice(x[first : first + 50]), OnDevice(dy[first : first + 50]))
            for first in range(0, 600, 50)
        ]
        stream = client.stream(rows, OnDevice(w))
        y = np.concatenate([block.y for block in stream])
        expected = client.gradients(x, w, dy)
    assert oracle.same_bits(y, expected.y)
    assert stream.receipt.host_copy_bytes == size_bytes(x, w, dy)
