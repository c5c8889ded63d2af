from __future__ import annotations

import array
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gradwire
from gradwire._arrays.device_copy import HostCopies
from gradwire._arrays.operand import operand
from gradwire_protocol.dtypes import Dtype

MATRIX = np.arange(12, dtype=np.float32).reshape(3, 4)


def sent(value: Any, elements: int = 5) -> bytes:
    """The bytes that would be sent, in pieces of so many elements."""
    taken = operand(value, "x")
    data = b""
    for index, payload in taken.pieces(0, taken.rows, elements):
        assert index * taken.dtype.itemsize == len(data)
        assert 0 < len(payload) <= elements * taken.dtype.itemsize
        data += payload
    return data


LAYOUTS: dict[str, Any] = {
    "c": lambda a: a,
    "fortran": np.asfortranarray,
    "every other row": lambda a: np.repeat(a, 2, axis=0)[::2],
    "every other column": lambda a: np.repeat(a, 2, axis=1)[:, ::2],
    "reversed": lambda a: a[::-1, ::-1].copy()[::-1, ::-1],
    # NumPy has no big-endian bfloat16: newbyteorder leaves it as it is.
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
    "broadcast": lambda a: np.broadcast_to(a[:1], a.shape),
    "unaligned": lambda a: np.frombuffer(
        b"\0" + a.tobytes(), a.dtype, offset=1
    ).reshape(a.shape),
}


@pytest.mark.parametrize("dtype", list(Dtype))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("elements", [1, 3, 4, 9, 100])
def test_every_layout_is_sent_row_by_row_in_the_wires_form(
    dtype: Dtype, layout: str, elements: int
) -> None:
    given_array = LAYOUTS[layout](MATRIX.astype(dtype.numpy))
    expected = np.ascontiguousarray(given_array).astype(dtype.numpy).tobytes()
    assert sent(given_array, elements) == expected
    assert operand(given_array, "x").dtype is dtype


@given(st.data())
def test_leading_dimensions_count_as_rows_in_any_order_of_memory(
    data: st.DataObject,
) -> None:
    shape = data.draw(st.lists(st.integers(0, 4), min_size=3, max_size=5))
    axes = data.draw(st.permutations(range(len(shape))))
    base = np.arange(np.prod(shape), dtype=np.float64).reshape(shape)
    x = base.transpose(axes)
    taken = operand(x, "x")
    assert taken.lead == x.shape[:-1]
    assert taken.rows == int(np.prod(x.shape[:-1]))
    assert sent(x, data.draw(st.integers(1, 9))) == x.tobytes()


def test_an_array_in_order_is_not_copied() -> None:
    pieces = [payload for _, payload in operand(MATRIX, "x").pieces(0, 3, 5)]
    for payload in pieces:
        assert np.shares_memory(np.frombuffer(payload, np.uint8), MATRIX)


def test_a_transposed_array_is_copied_a_few_rows_at_a_time() -> None:
    tall = np.ones((8, 1000), np.float32).T
    pieces = operand(tall, "x").pieces(0, 1000, 16)
    _, payload = next(pieces)
    assert len(payload) == 16 * 4


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (2, 0, 5), (0, 3, 0)])
def test_an_empty_array_sends_nothing(shape: tuple[int, ...]) -> None:
    assert sent(np.empty(shape, np.float32)) == b""


class Arrayish:
    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return MATRIX


class Pillowish:
    """As Pillow's images are."""

    __array_interface__ = MATRIX.__array_interface__


class ArrayStruct:
    __array_struct__ = MATRIX.__array_struct__


class Dlpackish:
    def __dlpack__(self, **kwargs: Any) -> Any:
        return MATRIX.__dlpack__(**kwargs)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


class OnTheCard:
    """As CuPy's arrays are: they refuse to be copied without being asked."""

    __cuda_array_interface__: Any = None
    device = "<CUDA Device 0>"

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")


class DlpackOnTheCard(Dlpackish):
    """As the array API says: what lies elsewhere is copied only when asked for."""

    device = "cuda:0"

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: Any = None,
        dl_device: Any = None,
        copy: Any = None,
    ) -> Any:
        if dl_device != (1, 0) or copy is False or stream is not None:
            raise BufferError("not without a copy")
        return MATRIX.copy().__dlpack__(max_version=max_version)


class DlpackForTheCardOnly(DlpackOnTheCard):
    """As libraries did before DLPack could ask for another device."""

    def __dlpack__(self, *, stream: Any = None) -> Any:
        raise AssertionError("unreachable")


@pytest.mark.parametrize(
    "value",
    [
        MATRIX,
        Arrayish(),
        Pillowish(),
        ArrayStruct(),
        Dlpackish(),
        DlpackOnTheCard(),
        memoryview(MATRIX),
        list(MATRIX),
        MATRIX.view(np.memmap),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_holds_an_array_is_taken(value: Any) -> None:
    assert sent(value) == MATRIX.tobytes()
    assert operand(value, "x").dtype is Dtype.FLOAT32


def test_lists_of_python_floats_are_float64_as_in_numpy() -> None:
    taken = operand([[1.0, 2.0], [3.0, 4.5]], "x")
    assert taken.dtype is Dtype.FLOAT64
    assert sent([[1.0, 2.0], [3.0, 4.5]]) == np.array([[1, 2], [3, 4.5]]).tobytes()


COMPUTES = "expected one of float16, bfloat16, float32, float64; "


MASKED = (
    "x is a masked array with masked elements, and the server has no masks: fill it"
    " first, for a NumPy array with x.filled(...)"
)


class Lazy:
    """Read when it is converted, as netCDF4's variables and Dask's arrays are."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        del dtype, copy
        return self._array


@pytest.mark.parametrize(
    "value",
    [
        np.ma.masked_array(MATRIX),
        np.ma.masked_array(MATRIX, mask=np.zeros(MATRIX.shape)),
        [np.ma.masked_array(row) for row in MATRIX],
        Lazy(np.ma.masked_array(MATRIX)),
    ],
    ids=["no mask", "nothing masked", "in a list", "lazy"],
)
def test_a_masked_array_without_masked_elements_is_taken(value: Any) -> None:
    taken = operand(value, "x").take(0, len(MATRIX))
    assert type(taken) is np.ndarray
    np.testing.assert_array_equal(taken, MATRIX)


def test_a_tensors_storage_can_still_be_resized() -> None:
    """As FSDP2 does with the parameters that it gathers."""
    torch = pytest.importorskip("torch")
    for dtype in (torch.float32, torch.bfloat16):
        tensor = torch.ones(3, 3, dtype=dtype)
        assert operand(tensor, "x").take(0, 3).sum() == 9
        tensor.untyped_storage().resize_(0)


def without_memory(torch: Any) -> Iterator[Any]:
    """Tensors on the CPU that have a shape and a dtype, but no elements to read."""
    fake_tensor = pytest.importorskip("torch._subclasses.fake_tensor")

    class Wrapper(torch.Tensor):  # as the weights of torchao
        @staticmethod
        def __new__(cls, inner: Any) -> Any:
            make = torch.Tensor._make_wrapper_subclass
            return make(cls, inner.shape, dtype=inner.dtype)

        def __init__(self, inner: Any) -> None:
            self.inner = inner

        @classmethod
        def __torch_dispatch__(
            cls, function: Any, kinds: Any, args: Any = (), options: Any = None
        ) -> Any:
            plain = [each.inner if isinstance(each, cls) else each for each in args]
            return cls(function(*plain, **(options or {})))

    for dtype in (torch.float32, torch.bfloat16):
        yield Wrapper(torch.ones(3, 4, dtype=dtype))
        with fake_tensor.FakeTensorMode():
            fake = torch.ones(3, 4, dtype=dtype)
        yield fake
        traced: list[Any] = []
        torch.func.functionalize(traced.append)(torch.ones(3, 4, dtype=dtype))
        yield traced[0]


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_a_tensor_without_memory_is_refused() -> None:
    torch = pytest.importorskip("torch")
    tensors = list(without_memory(torch))
    assert len(tensors) == 6
    for tensor in tensors:
        with pytest.raises(gradwire.InputError, match="no memory of its own"):
            operand(tensor, "x")


def test_a_tensor_of_zeros_without_memory_is_taken() -> None:
    """As PyTorch's forward differentiation makes them."""
    torch = pytest.importorskip("torch")
    # What NumPy would allocate for it has most likely this memory, and these elements.
    np.full((300, 400), 7, np.float32)
    for dtype in (torch.float32, torch.bfloat16):
        tensor = torch._efficientzerotensor((300, 400), dtype=dtype)
        assert not operand(tensor, "x").take(0, 300).any()


def test_an_object_whose_dlpack_has_no_memory_is_refused() -> None:
    torch = pytest.importorskip("torch")

    class Empty:  # of any library
        def __dlpack__(self, **kwargs: Any) -> Any:
            return torch._efficientzerotensor((3, 4)).__dlpack__()

        def __dlpack_device__(self) -> tuple[int, int]:
            return (1, 0)

    with pytest.raises(gradwire.InputError, match="no memory of its own"):
        operand(Empty(), "x")


def test_what_no_array_can_be_made_of_is_refused_with_what_to_pass() -> None:
    torch = pytest.importorskip("torch")
    sparse = pytest.importorskip("scipy.sparse")

    class Distributed(torch.Tensor):  # as DTensor, which needs a process group
        def full_tensor(self) -> Any:
            return self

    with warnings.catch_warnings(action="ignore"):  # prototypes
        nested = torch.nested.nested_tensor([torch.ones(2, 2)])
        quantized = torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8)
    for value, says in (
        (sparse.csr_array(MATRIX), "x is a sparse matrix: pass x.toarray()"),
        (sparse.coo_matrix(MATRIX), "x is a sparse matrix: pass x.toarray()"),
        (torch.nn.UninitializedParameter(), "uninitialized parameter of a lazy"),
        (torch.ones(2, 2).as_subclass(Distributed), "pass x.full_tensor() or"),
        (nested, "x is a nested tensor: pass x.to_padded_tensor(0.0)"),
        (quantized, "x is a quantized tensor: pass x.dequantize()"),
        (
            [torch.ones(3), torch.ones(3, dtype=torch.float64)],
            "x has arrays of torch.float32 and torch.float64: convert them to one",
        ),
        (np.array([["a"]], np.dtypes.StringDType()), "or text cannot be sent"),
        (np.array([["a"]]), "or text cannot be sent"),
    ):
        with pytest.raises(gradwire.InputError) as refused:
            operand(value, "x")
        assert says in str(refused.value)


def test_a_masked_tensor_is_refused() -> None:
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings(action="ignore"):  # a prototype
        masked = torch.masked.masked_tensor(
            torch.ones(2, 2), torch.tensor([[True, False], [True, True]])
        )
    with pytest.raises(gradwire.InputError, match="masked elements"):
        operand(masked, "x")


def test_a_list_of_tensors_that_cannot_be_converted_is_refused() -> None:
    torch = pytest.importorskip("torch")
    rows = [torch.ones(3, requires_grad=True), torch.ones(3)]
    with pytest.raises(gradwire.InputError, match="x is a list, which is not an array"):
        operand(rows, "x")


def test_a_quantity_with_a_unit_is_refused() -> None:
    pint = pytest.importorskip("pint")
    registry = pint.UnitRegistry()
    with pytest.raises(gradwire.InputError, match="x has the unit meter, and results"):
        operand(MATRIX * registry.meter, "x")
    with pytest.raises(gradwire.InputError, match="x has the unit meter, and results"):
        operand([row * registry.meter for row in MATRIX], "x")


def test_missing_values_of_a_table_are_refused() -> None:
    arrow = pytest.importorskip("pyarrow")
    table = arrow.table({"a": [1.0, None], "b": [2.0, 3.0]})
    with pytest.raises(gradwire.InputError, match="x has 1 missing values"):
        operand(table, "x")
    whole = table.slice(0, 1)
    np.testing.assert_array_equal(operand(whole, "x").take(0, 1), [[1.0, 2.0]])


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (
            MATRIX.astype(np.int64),
            f"x is int64: {COMPUTES}convert with x.astype(np.float32)",
        ),
        (
            [[1, 2], [3, 4]],
            f"x is int64: {COMPUTES}convert with x.astype(np.float32)",
        ),
        (
            MATRIX > 3,
            f"x is bool: {COMPUTES}convert with x.astype(np.float32)",
        ),
        (
            MATRIX.astype(np.longdouble),
            f"x is {np.dtype(np.longdouble)}: {COMPUTES}convert with"
            " x.astype(np.float32)",
        ),
        (
            MATRIX.astype(ml_dtypes.float8_e4m3fn),
            f"x is float8_e4m3fn: {COMPUTES}convert with x.astype(np.float32)",
        ),
        (
            MATRIX.astype(np.complex64),
            f"x is complex64: {COMPUTES}pass x.real and x.imag in separate jobs",
        ),
        (
            MATRIX.astype(object),
            f"x is object: {COMPUTES}an array of Python objects or text cannot be sent",
        ),
        (
            MATRIX.astype(ml_dtypes.bfloat16).view("V2"),
            f"x is |V2: {COMPUTES}raw 2-byte values may be x.view(ml_dtypes.bfloat16)",
        ),
        (
            MATRIX[0],
            "x has shape (4,): expected at least two dimensions; make it one row with"
            " x[None, :] or one column with x[:, None]",
        ),
        (
            np.float32(1.5),
            "x has shape (): expected at least two dimensions",
        ),
        (
            array.array("f", [1, 2]),
            "x has shape (2,): expected at least two dimensions; make it one row with"
            " x[None, :] or one column with x[:, None]",
        ),
        (
            np.ma.masked_array(MATRIX, mask=MATRIX > 3),
            MASKED,
        ),
        ([np.ma.masked_array(row, mask=row > 3) for row in MATRIX], MASKED),
        ((MATRIX, np.ma.masked_array(MATRIX, mask=MATRIX > 3)), MASKED),
        ([[1.0, np.ma.masked]], MASKED),
        (Lazy(np.ma.masked_array(MATRIX, mask=MATRIX > 3)), MASKED),
        ([Lazy(np.ma.masked_array(row, mask=row > 3)) for row in MATRIX], MASKED),
        (
            OnTheCard(),
            f"x is a {__name__}.OnTheCard on <CUDA Device 0>, which"
            " cannot be copied to host memory (Implicit conversion to a NumPy array is"
            " not allowed.): pass a copy in host memory",
        ),
        (
            DlpackForTheCardOnly(),
            f"x is a {__name__}.DlpackForTheCardOnly on cuda:0, which"
            " cannot be copied to host memory"
            " (DlpackForTheCardOnly.__dlpack__() got an unexpected keyword argument"
            " 'dl_device'): pass a copy in host memory",
        ),
        (
            None,
            "x is None, which is not an array: expected an array of float16,"
            " bfloat16, float32, float64",
        ),
        (
            {"a": 1},
            "x is a dict, which is not an array: expected an array of float16,"
            " bfloat16, float32, float64",
        ),
        (
            "x.npy",
            "x is a str, which is not an array: expected an array of float16,"
            " bfloat16, float32, float64",
        ),
        (
            3.5,
            "x is a float, which is not an array (memoryview: a bytes-like object is"
            " required, not 'float'): expected an array of float16, bfloat16, float32,"
            " float64",
        ),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_what_cannot_be_an_operand_is_refused_with_what_to_do(
    value: Any, sentence: str
) -> None:
    with pytest.raises(gradwire.InputError) as refused:
        operand(value, "x")
    assert str(refused.value) == sentence


def test_a_ragged_list_is_refused() -> None:
    with pytest.raises(gradwire.InputError, match="x is a list, which is not an array"):
        operand([[1.0], [1.0, 2.0]], "x")


class FakeTensor:
    """As much of a PyTorch tensor as is looked at."""

    requires_grad = True
    shape = MATRIX.shape

    def __init__(
        self, device: str, layout: str = "strided", dtype: str = "torch.float32"
    ) -> None:
        self.device = types.SimpleNamespace(type=device)
        self.layout = layout
        self.dtype = dtype

    def detach(self) -> Any:
        return self

    def resolve_neg(self) -> Any:
        return self

    def cpu(self) -> Any:
        return FakeTensor("cpu", self.layout, self.dtype)

    def _is_zerotensor(self) -> bool:
        return False

    def numpy(self) -> Any:
        if self.device.type != "cpu":
            raise TypeError("can't convert cuda:0 device type tensor to numpy.")
        return MATRIX


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module in PyTorch's place, as if the caller had imported it."""
    fake = types.ModuleType("torch")
    fake.Tensor = FakeTensor  # type: ignore[attr-defined]
    fake.strided = "strided"  # type: ignore[attr-defined]
    fake.bfloat16 = "bfloat16"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", fake)


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_tensor_that_requires_grad_is_taken(device: str) -> None:
    assert sent(FakeTensor(device)) == MATRIX.tobytes()


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("layout", "dtype", "says"),
    [
        ("sparse_coo", "torch.float32", "x is a sparse tensor: pass x.to_dense()"),
        (
            "strided",
            "torch.float8_e4m3fn",
            "x is float8_e4m3fn: expected one of float16, bfloat16, float32, float64;"
            " convert with x.to(torch.float32)",
        ),
        (
            "strided",
            "torch.float8_e5m2",
            "x is float8_e5m2: expected one of float16, bfloat16, float32, float64;"
            " convert with x.to(torch.float32)",
        ),
    ],
)
def test_a_tensor_that_cannot_be_sent_is_refused(
    device: str, layout: str, dtype: str, says: str
) -> None:
    with pytest.raises(gradwire.InputError) as refused:
        operand(FakeTensor(device, layout, dtype), "x")
    assert says in str(refused.value)


@pytest.mark.parametrize("value", [DlpackOnTheCard(), MATRIX], ids=["device", "host"])
def test_copies_from_a_device_are_counted(value: Any) -> None:
    copies = HostCopies()
    taken = operand(value, "x", copies=copies)
    if value is MATRIX:
        assert (copies.size_bytes, copies.seconds) == (0, 0)
    else:
        assert copies.size_bytes == MATRIX.nbytes
        assert copies.seconds > 0
        assert not np.shares_memory(taken.array, MATRIX)
