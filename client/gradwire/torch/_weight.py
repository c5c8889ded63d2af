"""Weights that stay in a session."""

from __future__ import annotations

import itertools
import threading
import warnings
import weakref
from collections.abc import Mapping
from multiprocessing.context import get_spawning_popen
from typing import Any, Self

import numpy as np
import torch

from gradwire._api.errors import ClientStateError, InputError
from gradwire._api.options import DtypeLike, parse_dtype
from gradwire._client._sync.session import Session
from gradwire._core.kept import Tensor
from gradwire_protocol.dtypes import WIRE_DTYPES
from gradwire_protocol.limits import MAX_NAME_LENGTH

_HALF = (torch.float16, torch.bfloat16)


class Weight:
    """The weight of a `Linear`: a handle without elements.

    It has `shape`, `dtype`, `numel()` and so on, but it is no tensor: `fetch()` returns
    its elements. Layers with one weight, which are tied, have one handle.

    Attributes:
        session: The session.
        tensor: The weight in it, of shape (out_features, in_features).
        gradient: Its gradient in the session; None if it does not require one.
        shape: (out_features, in_features).
        dtype: The dtype that `fetch` and `state_dict` return. A float16 or bfloat16
            weight that requires a gradient is float32 in the session, with a rounded
            copy for jobs.
        device: The device of the parameter that it becomes in a local layer.
        name: Its name in the session.
    """

    def __init__(
        self,
        session: Session,
        elements: torch.Tensor,
        *,
        requires_grad: bool = True,
        wire_dtype: DtypeLike = None,
        compute_dtype: DtypeLike = None,
        name: str = "",
    ) -> None:
        check_session(session)
        if elements.is_meta:
            raise InputError(
                f"the weight {name!r} is on meta and has no elements: initialize or"
                " load the model, as with model.to_empty(device='cpu'), before offload"
            )
        self.session = session
        self.shape = elements.shape
        self.dtype = elements.dtype
        self.device = elements.device
        self.name = name[-MAX_NAME_LENGTH:]
        copy = _copy_dtype(elements.dtype, requires_grad, wire_dtype, compute_dtype)
        self.tensor = session.put(
            self._kept(elements, requires_grad),
            name=self.name,
            compute_dtype=copy,
            frozen=not requires_grad,
        )
        self._frozen = not requires_grad
        self.gradient: Tensor | None = None
        self.made_local = False
        """Whether it has left the session for a local layer."""
        self.touched = False
        """Whether the gradient may have contributions since the last step."""
        # For graphs: a number that stands for the weight, and a leaf by which autograd
        # knows that the weight requires a gradient.
        with torch.inference_mode(False), torch.enable_grad():
            self.handle = torch.tensor(next(_new_number))
            self.leaf = torch.zeros((), requires_grad=True)
            self.leaf_node = self.leaf.view_as(self.leaf).grad_fn.next_functions[0][0]
        _weights[int(self.handle)] = self
        self._fetched: Any = lambda: None
        self._shared: torch.nn.Parameter | None = None
        self._lock = threading.Lock()
        try:
            self.requires_grad = requires_grad
        except BaseException:
            session.drop(self.tensor)
            raise

    @property
    def requires_grad(self) -> bool:
        """Whether backward passes add to the gradient. It can be set.

        A float16 or bfloat16 weight that was made without cannot require one later. A
        float32 or float64 weight is fetched and put again then, because it may share
        its memory with other sessions.
        """
        return self._requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        if value and self.gradient is None:
            if self.tensor.dtype not in ("float32", "float64"):
                raise InputError(
                    f"the weight {self.name!r} is kept as {self.tensor.dtype}: only"
                    " float32 and float64 weights have gradients; set requires_grad"
                    " before offload"
                )
            if self._frozen:
                self._put_again(frozen=False)
            self.gradient = self.session.zeros_like(
                self.tensor, name=f"{self.name}.grad"[-MAX_NAME_LENGTH:]
            )
        self._requires_grad = bool(value)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Set `requires_grad`, and return the weight."""
        self.requires_grad = requires_grad
        return self

    @property
    def ndim(self) -> int:
        """The number of dimensions, 2."""
        return len(self.shape)

    @property
    def is_leaf(self) -> bool:
        """True, as of a parameter."""
        return True

    def dim(self) -> int:
        """Return the number of dimensions, 2."""
        return len(self.shape)

    def numel(self) -> int:
        """Return the number of elements."""
        return self.shape.numel()

    def size(self, dim: int | None = None) -> Any:
        """Return the shape, or one of its sizes."""
        return self.shape if dim is None else self.shape[dim]

    def fetch(self) -> torch.Tensor:
        """Return a copy of the elements, on the CPU.

        Raises:
            GradwireError: The call failed.
        """
        return from_numpy(self.session.get(self.tensor)).to(self.dtype)

    def to_parameter(self) -> torch.nn.Parameter:
        """Return a parameter with a copy of the elements, on `device`.

        Raises:
            GradwireError: The call failed.
        """
        elements = self.fetch().to(self.device)
        return torch.nn.Parameter(elements, requires_grad=self.requires_grad)

    def fetch_for(self, state_dict: Mapping[str, Any]) -> torch.Tensor:
        """Return a copy of the elements, or the one that a state_dict has already."""
        fetched: torch.Tensor | None = self._fetched()
        if fetched is None or all(each is not fetched for each in state_dict.values()):
            fetched = self.fetch()
            self._fetched = weakref.ref(fetched)
        return fetched

    def fetch_gradient(self) -> torch.Tensor | None:
        """Return a copy of the gradient, on the CPU; None if there is none.

        Raises:
            GradwireError: The call failed.
        """
        if self.gradient is None:
            return None
        return from_numpy(self.session.get(self.gradient))

    def put(self, elements: torch.Tensor) -> None:
        """Replace the elements. The optimizer's state of the weight goes on.

        Args:
            elements: Shape (out_features, in_features); they are cast to the weight's
                dtype.

        Raises:
            InputError: The shape is another one.
            GradwireError: The call failed.
        """
        if elements.shape != self.shape:
            raise InputError(
                f"the elements have shape {tuple(elements.shape)}: expected"
                f" {tuple(self.shape)}"
            )
        trains = self.tensor.dtype == "float32"
        self.session.put(
            self._kept(elements.detach().to(self.dtype), trains),
            name=self.name,
            compute_dtype=self.tensor.compute_dtype,
            replace=self.tensor,
            keep_states=not self._frozen,
            frozen=self._frozen,
        )

    def forget_states(self) -> None:
        """Forget the optimizer's state, as of a weight that was never updated.

        Raises:
            GradwireError: The call failed.
        """
        self._put_again(frozen=self._frozen)

    def zero_grad(self) -> None:
        """Forget the gradient's contributions; without any, nothing is sent."""
        with self._lock:
            touched, self.touched = self.touched, False
        try:
            if touched and self.gradient is not None:
                self.session.clear(self.gradient)
        except BaseException:
            self.touched = True  # nobody knows; Ctrl-C, too
            raise

    def _put_again(self, *, frozen: bool) -> None:
        """Replace the weight by one with the same elements, and without states."""
        self.session.put(
            self.session.get(self.tensor),
            compute_dtype=self.tensor.compute_dtype,
            replace=self.tensor,
            frozen=frozen,
        )
        self._frozen = frozen

    def _kept(self, elements: torch.Tensor, trains: bool) -> torch.Tensor:
        elements = elements.detach()
        if trains and elements.dtype in _HALF:
            elements = elements.float()
        return elements.contiguous()

    def __getattr__(self, name: str) -> Any:
        if name in ("grad", "main_grad"):
            raise AttributeError(
                "the gradient is kept on the server: layer.weight.fetch_gradient(), or"
                " session.get(layer.gradient), returns it"
            )
        raise AttributeError(
            f"a weight in a session has no {name!r}: layer.weight.fetch() returns it as"
            " a tensor"
        )

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(function, "__name__", function)
        raise TypeError(
            f"{name} was called with a weight that is kept on a server: call the layer,"
            " or pass layer.weight.fetch()"
        )

    def _refuse(self, *_: object) -> Any:
        raise TypeError(
            "a weight that is kept on a server has no elements here:"
            " layer.weight.fetch() returns it as a tensor"
        )

    # Python looks for these in the class, not with __getattr__.
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __truediv__ = __rtruediv__ = __matmul__ = __rmatmul__ = __pow__ = _refuse
    __neg__ = __abs__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __getitem__ = __setitem__ = __len__ = __iter__ = __array__ = _refuse

    def __bool__(self) -> bool:
        return True  # not by its length

    def __copy__(self) -> Weight:
        return self

    def __deepcopy__(self, memo: Any) -> torch.nn.Parameter:
        warnings.warn(
            "a deep copy of a model has all weights here: to average or compare it with"
            " the model, use state_dict() of both; parameters() of the model has the"
            " local ones only",
            stacklevel=2,
        )
        return self.to_parameter()  # without a gradient, as a copied parameter

    def __reduce_ex__(self, protocol: Any) -> Any:
        parameter = self.to_parameter()
        if get_spawning_popen() is not None:
            # PyTorch shares its memory with the new process, which opens it later.
            self._shared = parameter
        return parameter.__reduce_ex__(protocol)

    def __repr__(self) -> str:
        return (
            f"<gradwire.torch.Weight {self.name!r} {tuple(self.shape)} {self.dtype}"
            f"{'' if self.requires_grad else ', frozen'}>"
        )


_weights: weakref.WeakValueDictionary[int, Weight] = weakref.WeakValueDictionary()

_new_number = itertools.count(1)


def weight_of(handle: torch.Tensor) -> Weight:
    """Return the weight of a handle.

    Raises:
        ClientStateError: The weight no longer exists.
    """
    weight = _weights.get(int(handle))
    if weight is None:
        raise ClientStateError("the layer of this graph no longer exists")
    return weight


def check_session(session: Session) -> None:
    """Check that an argument is a session.

    Raises:
        InputError: It is something else.
    """
    if not isinstance(session, Session):
        raise InputError(
            f"session is a {type(session).__qualname__}: expected a"
            " gradwire.Session, as client.session() returns"
        )


def label_of(dtype: torch.dtype) -> str:
    """Return gradwire's name of a dtype."""
    return str(dtype).removeprefix("torch.")


def from_numpy(array: Any) -> torch.Tensor:
    """Return an array's elements as a tensor."""
    array = np.ascontiguousarray(array)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _copy_dtype(
    dtype: torch.dtype, trains: bool, wire_dtype: DtypeLike, compute_dtype: DtypeLike
) -> str | None:
    """Return the dtype of a weight's copy for jobs.

    Raises:
        InputError: The options do not fit each other.
    """
    wanted = {}
    for name, value in (("wire_dtype", wire_dtype), ("compute_dtype", compute_dtype)):
        if value is not None:
            wanted[name] = parse_dtype(value, name, WIRE_DTYPES).label
    if dtype in _HALF and trains:
        wanted["dtype"] = label_of(dtype)
    if len(set(wanted.values())) > 1:
        text = " and ".join(f"{name} is {label}" for name, label in wanted.items())
        raise InputError(f"{text}: a weight has one copy, of one dtype")
    if not wanted or (dtype in _HALF and not trains):
        return None
    if dtype is torch.float64:
        raise InputError(
            f"{', '.join(wanted)} is for float32 weights, but the weight is float64"
        )
    return next(iter(wanted.values()))
