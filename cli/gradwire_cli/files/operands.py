"""The operands of ``gradwire compute``: selection and checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, overload

from gradwire_cli.errors import CommandError, ExitStatus
from gradwire_cli.files.npy import Array, NpyMatrix, open_npy
from gradwire_cli.files.results import ResultSpec
from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.matrices import DEFAULT_RESULTS, RESULTS, Matrix, operands_for

_ROWS_BYTES = 4 << 20
"""Bytes of X and dY read at once."""

_MEANING = {
    Matrix.X: "x (the first file, or --x)",
    Matrix.W: "w (the second file, or --w)",
    Matrix.DY: "dy (the third file, or --dy)",
}


def wanted_results(
    names: Sequence[str] | None, files: Mapping[Matrix, Path]
) -> tuple[Matrix, ...]:
    """The results to compute: the named ones, or what the files suffice for.

    Raises:
        CommandError: A name is unknown, or a needed file is missing.
    """
    if names is None:
        wanted = tuple(r for r in DEFAULT_RESULTS if all(o in files for o in r.needs))
        if not wanted:
            raise CommandError(
                "at least two operands are needed: x and w give y, dy and w give dx, "
                "x and dy give dw",
                ExitStatus.USAGE,
            )
        return wanted
    by_label = {result.label: result for result in RESULTS}
    unknown = [name for name in names if name not in by_label]
    if unknown or not names:
        raise CommandError(
            f"--results names {', '.join(map(repr, unknown)) or 'nothing'}: "
            f"expected some of {','.join(by_label)}",
            ExitStatus.USAGE,
        )
    wanted = tuple(result for result in RESULTS if result.label in names)
    missing = [o for o in operands_for(wanted) if o not in files]
    if missing:
        raise CommandError(
            f"{', '.join(r.label for r in wanted)} cannot be computed without "
            f"{' and '.join(_MEANING[operand] for operand in missing)}",
            ExitStatus.USAGE,
        )
    return wanted


def result_dtypes(names: Sequence[str], wanted: Sequence[Matrix]) -> dict[str, Dtype]:
    """Dtypes of results that differ from the operands' dtype.

    Args:
        names: A dtype for all results (``float32``), or for single results
            (``dw=float32``).
        wanted: The results.

    Raises:
        CommandError: A named result is not wanted, or a dtype is unknown.
    """
    labels = [result.label for result in wanted]
    found: dict[str, Dtype] = {}
    for name in names:
        result, equals, dtype = name.rpartition("=")
        try:
            chosen = Dtype.named(dtype)
        except KeyError:
            raise CommandError(
                f"--result-dtype names {dtype!r}: expected "
                + ", ".join(known.label for known in Dtype),
                ExitStatus.USAGE,
            ) from None
        if equals and result not in labels:
            raise CommandError(
                f"--result-dtype names {result!r}, but the wanted results are "
                + ", ".join(labels),
                ExitStatus.USAGE,
            )
        found |= dict.fromkeys([result] if equals else labels, chosen)
    return found


_Pair: TypeAlias = "tuple[Array | None, Array | None]"


@dataclass(frozen=True)
class RowParts(Sequence[_Pair]):
    """Rows of files in parts. Each access reads the part from the files."""

    x: NpyMatrix | None
    dy: NpyMatrix | None
    m: int
    step: int

    def __len__(self) -> int:
        # Zero rows are a part, too: its arrays tell n and k.
        return max(1, -(-self.m // self.step))

    @overload
    def __getitem__(self, number: int) -> _Pair: ...

    @overload
    def __getitem__(self, number: slice) -> Sequence[_Pair]: ...

    def __getitem__(self, number: int | slice) -> _Pair | Sequence[_Pair]:
        if isinstance(number, slice):
            return [self[each] for each in range(len(self))[number]]
        start = range(0, max(self.m, 1), self.step)[number]
        stop = min(start + self.step, self.m)
        return (
            self.x.rows(start, stop) if self.x is not None else None,
            self.dy.rows(start, stop) if self.dy is not None else None,
        )


@dataclass(frozen=True)
class Operands:
    """The operands of a job, in open files with matching shapes."""

    files: Mapping[Matrix, NpyMatrix]
    m: int
    n: int
    k: int
    dtype: Dtype

    @property
    def size_bytes(self) -> int:
        """Bytes of all operands."""
        return sum(file.size_bytes for file in self.files.values())

    def w(self) -> Array | None:
        """All of W; None if no result needs W."""
        file = self.files.get(Matrix.W)
        return file.rows(0, self.n) if file is not None else None

    def rows(self) -> RowParts:
        """X and dY, some rows at a time; None for an unneeded operand."""
        row_bytes = (self.n + self.k) * self.dtype.itemsize
        step = max(1, _ROWS_BYTES // max(row_bytes, 1))
        return RowParts(
            self.files.get(Matrix.X), self.files.get(Matrix.DY), self.m, step
        )

    def results(
        self, wanted: Sequence[Matrix], dtypes: Mapping[str, Dtype]
    ) -> dict[str, ResultSpec]:
        """Shapes and dtypes of the wanted results.

        Args:
            wanted: The results.
            dtypes: Dtypes that differ from the operands' dtype.
        """
        return {
            r.label: ResultSpec(
                r.shape(self.m, self.n, self.k)[r.is_vector :],
                dtypes.get(r.label, self.dtype),
            )
            for r in wanted
        }


def open_operands(
    paths: Mapping[Matrix, Path],
    wanted: Sequence[Matrix],
    stack: ExitStack,
    *,
    raw_as: Dtype | None,
) -> Operands:
    """Open the files needed for the wanted results; `stack` closes them.

    Raises:
        CommandError: A file is missing or not a matrix, or shapes or dtypes do
            not match. The message names the files, shapes and dtypes.
    """
    files: dict[Matrix, NpyMatrix] = {}
    for operand in operands_for(wanted):
        file = open_npy(paths[operand], raw_as=raw_as)
        stack.callback(file.close)
        files[operand] = file
    if len({file.dtype for file in files.values()}) > 1:
        raise CommandError(
            "the operands must have one dtype: "
            + ", ".join(f"{f.path} holds {f.dtype.label}" for f in files.values())
        )
    # The sizes shared by two operands, axis by axis.
    sizes: dict[str, int] = {}
    for name, places in _SHARED_SIZES.items():
        found = [(files[o], axis) for o, axis in places if o in files]
        sizes[name] = found[0][0].shape[found[0][1]] if found else 0
        for file, axis in found[1:]:
            first, first_axis = found[0]
            if file.shape[axis] != sizes[name]:
                raise CommandError(
                    f"{_axis(first, first_axis)} and {_axis(file, axis)} must be equal"
                )
    dtype = next(iter(files.values())).dtype
    return Operands(files, sizes["m"], sizes["n"], sizes["k"], dtype)


_SHARED_SIZES: dict[str, tuple[tuple[Matrix, int], ...]] = {
    "m": ((Matrix.X, 0), (Matrix.DY, 0)),
    "n": ((Matrix.X, 1), (Matrix.W, 0)),
    "k": ((Matrix.W, 1), (Matrix.DY, 1)),
}


def _axis(file: NpyMatrix, axis: int) -> str:
    return f"the {('rows', 'columns')[axis]} of {file.path} {file.shape}"
