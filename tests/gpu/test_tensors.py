"""Operands and results of the client in a GPU's memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import gradwire
from tests.support import oracle

NAMES = ("y", "dx", "dw")
SHAPE = (700, 130, 70)


class CupyArrays:
    """How CuPy's arrays are made and read."""

    def __init__(self) -> None:
        self.cupy: Any = pytest.importorskip("cupy")

    def put(self, array: Any) -> Any:
        return self.cupy.asarray(array)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return self.cupy.empty(shape, dtype)

    def read(self, value: Any) -> Any:
        return value.get()

    def busy_stream(self) -> Any:
        """A stream of its own with work that takes a while."""
        stream = self.cupy.cuda.Stream(non_blocking=True)
        with stream:
            large = self.cupy.ones((4096, 4096), "f4")
            for _ in range(20):
                large = large @ large / 4096
        return stream


class TorchTensors:
    """How PyTorch's CUDA tensors are made and read."""

    def __init__(self) -> None:
        self.torch: Any = pytest.importorskip("torch")
        if not self.torch.cuda.is_available():
            pytest.skip("PyTorch finds no device")

    def put(self, array: Any) -> Any:
        wide = self.torch.from_numpy(array.astype("f8"))
        return wide.to(getattr(self.torch, array.dtype.name)).cuda()

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        name = getattr(self.torch, np.dtype(dtype).name)
        return self.torch.empty(shape, dtype=name, device="cuda")

    def read(self, value: Any) -> Any:
        return value.double().cpu().numpy()

    def busy_stream(self) -> Any:
        stream = self.torch.cuda.Stream()
        with self.torch.cuda.stream(stream):
            large = self.torch.ones((4096, 4096), device="cuda")
            for _ in range(20):
                large = large @ large / 4096
        return self.torch.cuda.stream(stream)


@pytest.fixture(params=[CupyArrays, TorchTensors])
def library(request: pytest.FixtureRequest) -> Any:
    return request.param()


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_operands_and_results_may_lie_on_the_device(
    client: gradwire.Client, library: Any, dtype: str
) -> None:
    operands = oracle.operands(*SHAPE, dtype)
    expected = client.gradients(*operands)
    out = {
        name: library.empty(getattr(expected, name).shape, operands[0].dtype)
        for name in NAMES
    }
    result = client.gradients(*map(library.put, operands), out=out)
    for name in NAMES:
        assert getattr(result, name) is out[name]
        np.testing.assert_array_equal(
            library.read(out[name]).astype("f8"), getattr(expected, name).astype("f8")
        )
    arrays = (*operands, *expected)
    assert result.receipt.host_copy_bytes == sum(array.nbytes for array in arrays)
    assert result.receipt.host_copy_s > 0


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_operands_on_the_device_give_results_there(
    client: gradwire.Client, library: Any, dtype: str
) -> None:
    operands = oracle.operands(*SHAPE, dtype)
    expected = client.gradients(*operands)
    on_device = library.put(operands[1])
    result = client.gradients(operands[0], on_device, operands[2])
    for name in NAMES:
        array = getattr(result, name)
        assert type(array) is type(on_device)
        assert array.dtype == on_device.dtype
        assert array.device == on_device.device
        np.testing.assert_array_equal(
            library.read(array).astype("f8"), getattr(expected, name).astype("f8")
        )
    copied = (operands[1], *expected)
    assert result.receipt.host_copy_bytes == sum(array.nbytes for array in copied)


def test_results_go_into_any_layout(client: gradwire.Client, library: Any) -> None:
    operands = oracle.operands(*SHAPE)
    expected = client.gradients(*operands)
    dx = library.empty((130, 700), np.float32).T
    assert client.gradients(*operands, out={"dx": dx}).dx is dx
    np.testing.assert_array_equal(library.read(dx), expected.dx)


def test_copies_wait_for_the_callers_stream(
    client: gradwire.Client, library: Any
) -> None:
    """What was queued before the call is in the operands."""
    x, w, dy = oracle.operands(*SHAPE)
    expected = client.gradients(x, 2 * w, dy)
    on_device = library.put(w)
    with library.busy_stream():
        doubled = on_device * 2
        out = library.empty(expected.dx.shape, np.float32)
        client.gradients(library.put(x), doubled, library.put(dy), out={"dx": out})
        halved = out * 0.5
        read = library.read(halved)
    np.testing.assert_array_equal(read, expected.dx * np.float32(0.5))


def test_float8_tensors_are_refused(client: gradwire.Client) -> None:
    torch = TorchTensors().torch
    ones = torch.ones((16, 16), device="cuda")
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        with pytest.raises(gradwire.InputError, match=r"convert with x\.to"):
            client.forward(ones.to(dtype), ones.to(dtype))
