"""Results belong to the library that the operands belong to."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import types
from typing import Any

import numpy as np
import pytest

import gradwire
from tests.support import oracle
from tests.support.serving import ServerProcess

ALL = ("y", "dx", "dw", "db")


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch")


def to_torch(array: Any) -> Any:
    import torch

    wide = torch.from_numpy(array.astype("f8"))
    return wide.to(getattr(torch, array.dtype.name))


def assert_equal_tensor(result: Any, expected: Any) -> None:
    """A plain tensor on the CPU has a NumPy array's elements and dtype."""
    import torch

    assert type(result) is torch.Tensor
    assert result.device.type == "cpu"
    assert not result.requires_grad
    assert str(result.dtype) == f"torch.{expected.dtype.name}"
    assert tuple(result.shape) == expected.shape
    np.testing.assert_array_equal(result.double().numpy(), expected.astype("f8"))


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_tensors_give_tensors(caller: Any, torch: Any, dtype: str) -> None:
    operands = oracle.operands(50, 40, 30, dtype)
    expected = caller.gradients(*operands, results=ALL)
    tensors = tuple(map(to_torch, operands))
    result = caller.gradients(*tensors, results=ALL)
    for name in ALL:
        assert_equal_tensor(getattr(result, name), getattr(expected, name))
    assert result.receipt.host_copy_bytes == 0
    assert_equal_tensor(caller.forward(*tensors[:2]), expected.y)
    for one, other in zip(caller.backward(*tensors), expected[1:], strict=True):
        assert_equal_tensor(one, other)


def test_a_results_own_dtype_is_the_tensors(caller: Any, torch: Any) -> None:
    x, w, dy = map(to_torch, oracle.operands(20, 10, 15))
    result = caller.gradients(
        x, w, dy, result_dtype={"dx": "bfloat16", "dw": torch.float64}
    )
    dtypes = [each.dtype for each in result]
    assert dtypes == [torch.float32, torch.bfloat16, torch.float64]
    narrow = caller.gradients(x, w, dy, wire_dtype="bfloat16", verify=True)
    assert narrow.dw.dtype is torch.float32


def test_one_needed_tensor_is_enough(caller: Any, torch: Any) -> None:
    x, w, dy = oracle.operands(20, 10, 15)
    assert type(caller.forward(x, to_torch(w))) is torch.Tensor
    assert type(caller.forward(to_torch(x), w)) is torch.Tensor
    # W is checked, but dW does not need it.
    dw = caller.gradients(x, to_torch(w), dy, results="dw").dw
    assert type(dw) is np.ndarray
    assert type(caller.forward(x, w)) is np.ndarray


def test_out_is_handed_back_as_it_is(caller: Any, torch: Any) -> None:
    x, w, dy = oracle.operands(20, 10, 15)
    tensors = map(to_torch, (x, w, dy))
    dw = np.empty((10, 15), np.float32)
    result = caller.gradients(*tensors, out={"dw": dw})
    assert result.dw is dw
    assert type(result.y) is type(result.dx) is torch.Tensor


def test_large_tensors_keep_their_memory(server_address: str, torch: Any) -> None:
    """Result arrays come from a pool: no later job may write to a tensor's memory."""
    x, w, dy = map(to_torch, oracle.operands(600, 700, 650))
    with gradwire.connect(server_address, transport="grpc") as client:
        first = client.gradients(x, w, dy)
        kept = [each.clone() for each in first]
        for scale in (2, 3):
            client.gradients(scale * x, w, scale * dy)
    assert all(map(torch.equal, first, kept))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_streams_of_tensors_give_tensors(streamer: Any, torch: Any, dtype: str) -> None:
    x, w, dy = oracle.operands(150, 40, 30, dtype)
    parts = [slice(0, 70), slice(70, 150)]
    options: Any = {"results": ALL, "verify": True}
    expected, dw, _ = streamer.stream([(x[p], dy[p]) for p in parts], w, **options)
    rows = [(to_torch(x[p]), to_torch(dy[p])) for p in parts]
    blocks, tensor_dw, _ = streamer.stream(rows, to_torch(w), **options)
    assert len(blocks) == len(expected) > 2
    for block, other in zip(blocks, expected, strict=True):
        assert len(block) == len(other)
        assert_equal_tensor(block.y, other.y)
        assert_equal_tensor(block.dx, other.dx)
    assert_equal_tensor(tensor_dw, dw)


def test_a_stream_has_its_sums_once(client: gradwire.Client, torch: Any) -> None:
    x, w, dy = map(to_torch, oracle.operands(20, 10, 15))
    with client.stream([(x, dy)], w, results=ALL) as stream:
        list(stream)
    assert stream.dw is stream.dw
    assert stream.db.shape == (15,)
    assert type(stream.db) is torch.Tensor
    with client.stream([], w) as stream:
        list(stream)
    assert stream.dw.tolist() == torch.zeros(10, 15).tolist()


def test_forward_drops_no_graph_without_a_word(caller: Any, torch: Any) -> None:
    """Training would go on, and never update the weight."""
    x, w, dy = map(to_torch, oracle.operands(20, 10, 15))
    weight = torch.nn.Parameter(w)
    with pytest.raises(gradwire.InputError, match="w requires grad, but y would have"):
        caller.forward(x, weight)
    with torch.no_grad():
        assert not caller.forward(x, weight).requires_grad
    assert torch.equal(caller.forward(x, weight.detach()), caller.forward(x, w))
    # Whoever passes dY computes gradients without autograd.
    for result in caller.gradients(x, weight, dy):
        assert type(result) is torch.Tensor
        assert not result.requires_grad


class CupyLike:
    """An array as CuPy has them, in host memory."""

    device = contextlib.nullcontext()

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0  # CUDA

    def get(self) -> Any:
        return self.array.copy()


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stands for CuPy, which cannot make arrays without a GPU; tests/gpu has it."""
    module: Any = types.ModuleType("cupy")
    module.ndarray = CupyLike
    module.asarray = lambda array: CupyLike(array.copy())
    stream = types.SimpleNamespace(synchronize=lambda: None)
    module.cuda = types.SimpleNamespace(get_current_stream=lambda: stream)
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


def test_cupys_arrays_give_cupys_arrays(caller: Any, cupy: Any) -> None:
    x, w, dy = oracle.operands(150, 40, 30)
    expected = caller.gradients(x, w, dy)
    result = caller.gradients(x, cupy.asarray(w), dy, out={"dx": np.empty_like(x)})
    for name in ("y", "dw"):
        assert type(getattr(result, name)) is CupyLike
        assert oracle.same_bits(getattr(result, name).array, getattr(expected, name))
    assert type(result.dx) is np.ndarray
    copied = sum(array.nbytes for array in (w, expected.y, expected.dw))
    assert result.receipt.host_copy_bytes == copied


def test_a_streams_receipt_counts_copies_of_results(streamer: Any, cupy: Any) -> None:
    x, w, dy = oracle.operands(150, 40, 30)
    rows = [(cupy.asarray(x), cupy.asarray(dy))]
    blocks, dw, receipt = streamer.stream(rows, w)
    assert {type(block.dx) for block in blocks} == {type(dw)} == {CupyLike}
    assert receipt.host_copy_bytes == 2 * (x.nbytes + dy.nbytes) + w.nbytes


def test_torch_comes_before_cupy(caller: Any, cupy: Any, torch: Any) -> None:
    x, w, _ = oracle.operands(20, 10, 15)
    assert type(caller.forward(cupy.asarray(x), to_torch(w))) is torch.Tensor


def test_torch_is_not_imported_for_others(small_blocks: ServerProcess) -> None:
    program = """if True:
        import sys
        import numpy as np
        import gradwire

        ones = np.ones((3, 3))
        with gradwire.connect(sys.argv[1], timeout_s=30) as client:
            kinds = {type(r) for r in client.gradients(ones, ones, ones)}
            with client.stream([(ones, ones)], ones) as stream:
                kinds |= {type(block.y) for block in stream} | {type(stream.dw)}
            kinds |= {type(client.forward(np.ones((2, 3, 3)), np.ones((2, 3, 3))))}
        print(kinds == {np.ndarray}, {"cupy", "torch", "jax"} & set(sys.modules))
    """
    done = subprocess.run(
        [sys.executable, "-c", program, small_blocks.address],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "True set()\n", done.stderr
