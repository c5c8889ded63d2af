"""Tensors kept in a session, as operands and destinations of jobs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import numpy as np

from gradwire._api.errors import InputError
from gradwire._arrays.operand import Operand
from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.job_spec import JobSpec, KeptOperand, KeptResult
from gradwire_protocol.limits import SESSIONS
from gradwire_protocol.matrices import Matrix


def refuse_copy(what: str) -> NoReturn:
    """Refuse to copy or pickle what belongs to a session.

    Raises:
        TypeError: Always.
    """
    raise TypeError(
        f"a {what} belongs to a connection and cannot be pickled or copied: open a"
        " session where it is needed, and use save and restore"
    )


class Tensor:
    """A tensor kept in a session: a handle without elements.

    Attributes:
        name: Its name in files and descriptions.
        role: "weight", "gradient" or "activation", as long as the tensor is there.
        shape: Its shape.
        transposed: Whether this is the transpose of the kept matrix.
    """

    __slots__ = (
        "_compute",
        "_dtype",
        "name",
        "number",
        "role",
        "session",
        "shape",
        "transposed",
    )

    def __init__(
        self,
        session: object,
        number: int,
        shape: tuple[int, ...],
        dtype: Dtype,
        role: str,
        *,
        name: str = "",
        compute: Dtype | None = None,
        transposed: bool = False,
    ) -> None:
        self.session = session
        self.number = number
        self.name = name
        self.role = role
        self.shape = shape
        self.transposed = transposed
        self._dtype = dtype
        self._compute = compute

    @property
    def dtype(self) -> str:
        """Element type: "float32", ..."""
        return self._dtype.label

    @property
    def compute_dtype(self) -> str | None:
        """Element type of the copy for jobs; None: there is no copy."""
        return self._compute.label if self._compute else None

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def kept_shape(self) -> tuple[int, ...]:
        """The shape of the kept matrix, which may be transposed here."""
        return self.shape[::-1] if self.transposed else self.shape

    @property
    def T(self) -> Tensor:  # noqa: N802 - as numpy.ndarray has it
        """The transpose of a matrix, without moving its elements.

        Use it for weights of shape (out, in): ``session.forward(x, weight.T)``.

        Raises:
            InputError: The tensor does not have two dimensions.
        """
        if len(self.shape) != 2:
            raise InputError(
                f"the tensor has shape {self.shape}: expected two dimensions"
            )
        return Tensor(
            self.session,
            self.number,
            self.shape[::-1],
            self._dtype,
            self.role,
            name=self.name,
            compute=self._compute,
            transposed=not self.transposed,
        )

    def stand_in(
        self, others: Iterable[Operand], lead: tuple[int, ...] | None = None
    ) -> Operand:
        """Return an operand without elements, for checks.

        Args:
            others: The job's other operands: with the dtype of the tensor's copy, that
                copy is used.
            lead: Leading dimensions, of a tensor that is kept with fewer.
        """
        dtype = self._dtype
        if self._compute in {other.dtype for other in others}:
            dtype = self._compute or dtype
        shape = self.shape if lead is None else (*lead, self.shape[-1])
        one: Any = np.zeros((), dtype.numpy)
        return Operand(np.broadcast_to(one, shape), dtype)

    def __array__(self, *_: object, **__: object) -> NoReturn:
        """Refuse to become an array of one object.

        Raises:
            InputError: Always.
        """
        raise InputError(
            f"{self!r} has its elements in a session: get them with session.get, or use"
            " the session's forward and backward"
        )

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_copy("tensor of a session")

    def __repr__(self) -> str:
        name = f" {self.name!r}" if self.name else ""
        transposed = ", transposed" if self.transposed else ""
        return f"<gradwire.Tensor{name} {self.shape} {self.dtype}{transposed}>"


@dataclass(frozen=True, slots=True)
class Keeping:
    """The part of a job that stays in a session."""

    session: str = field(repr=False)
    """Name of the session, a secret."""
    affinity: str = ""
    """What a proxy recognizes the session's calls by."""
    tensors: Mapping[Matrix, Tensor] = field(default_factory=dict)
    """Operands that are kept tensors."""
    leads: Mapping[Matrix, tuple[int, ...]] = field(default_factory=dict)
    """Leading dimensions of kept operands that are kept with fewer."""
    last_use: Matrix | None = None
    """The operand that the session drops after the job."""
    keep: Mapping[Matrix, int] = field(default_factory=dict)
    """Sent operands that become tensors, and their numbers."""
    into: Mapping[Matrix, KeptResult] = field(default_factory=dict)
    """Results that stay in gradients."""

    @property
    def operands(self) -> Mapping[Matrix, KeptOperand]:
        """Operands that are kept tensors, as in a header."""
        return {
            matrix: KeptOperand(tensor.number, matrix is self.last_use)
            for matrix, tensor in self.tensors.items()
        }

    def stand_ins(self, sent: Mapping[Matrix, Operand]) -> dict[Matrix, Operand]:
        """Return the shapes and dtypes of the kept operands.

        Args:
            sent: The other operands.
        """
        found: dict[Matrix, Operand] = {}
        # Tensors with a copy go by the dtype of the others.
        for matrix, tensor in sorted(
            self.tensors.items(), key=lambda item: item[1].compute_dtype is not None
        ):
            others = [*sent.values(), *found.values()]
            found[matrix] = tensor.stand_in(others, self.leads.get(matrix))
        return found

    def applied(self, spec: JobSpec) -> JobSpec:
        """Return the spec of a job with these kept tensors."""
        return replace(
            spec,
            features=(*spec.features, SESSIONS),
            session=self.session,
            kept=self.operands,
            keep=self.keep,
            into=self.into,
        )
