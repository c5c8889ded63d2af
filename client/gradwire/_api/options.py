"""The options of a call: what callers may write, checked and made uniform."""

from __future__ import annotations

import math
import operator
import re
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from inspect import get_annotations
from typing import Any, TypeAlias, TypedDict, Unpack

import numpy as np

from gradwire._api.errors import InputError
from gradwire._api.types import Progress
from gradwire._api.verify import Verify, VerifyLike, parse_verify
from gradwire_protocol import checksum as checksums
from gradwire_protocol import limits
from gradwire_protocol.dtypes import ACCUMULATORS, WIRE_DTYPES, Dtype
from gradwire_protocol.matrices import DEFAULT_RESULTS, RESULTS, Matrix

DtypeLike: TypeAlias = Any
ResultDtypes: TypeAlias = "DtypeLike | Mapping[str, DtypeLike] | None"
Metadata: TypeAlias = "Mapping[str, str | bytes] | Iterable[tuple[str, str | bytes]]"
MetadataPairs: TypeAlias = tuple[tuple[str, "str | bytes"], ...]
OnProgress: TypeAlias = Callable[[Progress], object]

_LONGEST_TIMEOUT_S = 365 * 86_400.0
"""gRPC cannot count much longer ones, and nobody sits out this one."""

TRANSPORTS = ("auto", "tcp", "shm")

_DEFAULT_RESULTS = tuple(matrix.label for matrix in DEFAULT_RESULTS)
_NAMES = ", ".join(matrix.label for matrix in RESULTS)

_LEAST_TIMEOUT_S = 0.001
_METADATA_KEY = re.compile(r"[0-9a-z_.-]+")


@dataclass(frozen=True, slots=True)
class Options:
    """What a caller asked for, beside the operands."""

    results: tuple[Matrix, ...]
    """Wanted results, in the order Y, dX, dW, dB."""

    result_dtypes: Mapping[Matrix, Dtype]
    """Of the results that shall not have the operands' dtype."""

    wire_dtype: Dtype | None
    """In which float32 operands travel, and results not named above."""

    dw_accumulator: Dtype | None
    """In which dW is summed; None: as the contract has it."""

    allow_tf32: bool
    """Whether float32 products may use TF32."""

    checksum: bool
    """Whether every payload carries a CRC-32C."""

    verify: Verify | None
    """How results are checked here; None: as the client has it."""

    timeout_s: float | None
    """Seconds for the whole call; None: as long as it takes."""

    on_progress: OnProgress | None
    """Told how far the job has come."""

    job_id: str
    """The caller's id for the job, or one made up here."""

    metadata: tuple[tuple[str, str | bytes], ...] = field(repr=False)
    """Sent with the call. What it says may be a secret."""

    checkpoint_rows: int | None = None
    """Rows after which the server sends dW's sum; None: as is best."""


class ForwardOptions(TypedDict, total=False):
    """The options of `Client.forward`, which every call has; see `Client.gradients`."""

    result_dtype: ResultDtypes
    wire_dtype: DtypeLike
    allow_tf32: bool
    checksum: bool
    verify: VerifyLike
    timeout_s: float | None
    on_progress: OnProgress | None
    request_id: str | None
    metadata: Metadata


class BackwardOptions(ForwardOptions, total=False):
    """The options of `Client.backward`."""

    dw_accumulator: DtypeLike
    checkpoint_rows: int | None


class GradientsOptions(BackwardOptions, total=False):
    """The options of `Client.gradients` and `Client.stream`."""

    results: str | Iterable[str]


def check_names(call: str, given: Mapping[str, Any], known: type) -> None:
    """Check the names of keyword arguments, as Python checks a signature's.

    Raises:
        TypeError: A name is unknown.
    """
    for name in given:
        if name not in get_annotations(known):
            raise TypeError(f"{call}() got an unexpected keyword argument {name!r}")


def parse_options(**given: Unpack[GradientsOptions]) -> Options:
    """The options of a call, checked.

    Raises:
        InputError: A value is invalid; the text names its option.
    """
    wanted = _results(given.get("results", _DEFAULT_RESULTS))
    checksum = bool(given.get("checksum"))
    if checksum and not checksums.AVAILABLE:
        raise InputError(
            "checksum=True needs the package google-crc32c, which comes with"
            " gradwire[cli]: pip install google-crc32c"
        )
    on_progress = given.get("on_progress")
    if on_progress is not None and not callable(on_progress):
        raise InputError(f"on_progress is {on_progress!r}, which cannot be called")
    return Options(
        results=wanted,
        result_dtypes=_result_dtypes(given.get("result_dtype"), wanted),
        wire_dtype=_wire_dtype(given.get("wire_dtype")),
        dw_accumulator=_accumulator(given.get("dw_accumulator")),
        allow_tf32=bool(given.get("allow_tf32")),
        checksum=checksum,
        verify=parse_verify(given.get("verify")),
        timeout_s=parse_timeout(given.get("timeout_s"), "timeout_s"),
        on_progress=on_progress,
        job_id=_job_id(given.get("request_id")),
        metadata=parse_metadata(given.get("metadata", ())),
        checkpoint_rows=_checkpoint_rows(given.get("checkpoint_rows")),
    )


def parse_timeout(value: float | None, name: str) -> float | None:
    """Seconds, at most a year, or None where none were given.

    Raises:
        InputError: It is no positive number.
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except OverflowError:
        seconds = math.inf if value > 0 else math.nan
    except (TypeError, ValueError):
        seconds = math.nan
    if not seconds > 0:
        raise InputError(f"{name} is {value!r}: give seconds, more than 0, or None")
    return min(seconds, _LONGEST_TIMEOUT_S)


def parse_transport(value: str) -> str:
    """How elements shall travel: "auto", "tcp" or "shm".

    Raises:
        InputError: It is none of them.
    """
    if not isinstance(value, str) or value not in TRANSPORTS:
        raise InputError(f"transport is {value!r}; it can be {', '.join(TRANSPORTS)}")
    return value


def left_of(options: Options, begun: float) -> Options:
    """The options of a call that is part of one begun at a monotonic time."""
    if options.timeout_s is None:
        return options
    left = options.timeout_s - (time.monotonic() - begun)
    return replace(options, timeout_s=max(left, _LEAST_TIMEOUT_S))


def at_most(seconds: float, left_s: float | None) -> float:
    """So many seconds, or what is left where that is less; more than none."""
    return seconds if left_s is None else max(_LEAST_TIMEOUT_S, min(seconds, left_s))


def parse_metadata(metadata: Metadata) -> tuple[tuple[str, str | bytes], ...]:
    """Metadata as gRPC takes it: ``{"traceparent": "00-..."}`` or pairs.

    Raises:
        InputError: It is no such thing, or gRPC would refuse a key or a value.
    """
    pairs: Any = metadata.items() if isinstance(metadata, Mapping) else metadata
    if not isinstance(pairs, Iterable):
        raise InputError(
            f"metadata is {metadata!r}: give a mapping or pairs (key, value)"
        )
    checked = []
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise InputError(f"metadata has {pair!r}: give pairs (key, value)")
        key, value = pair
        if not isinstance(key, str) or not _METADATA_KEY.fullmatch(key):
            raise InputError(
                f"the metadata key {key!r} may hold digits, lower-case letters and"
                " the signs - _ . only"
            )
        if key.startswith("grpc-"):
            raise InputError(f"the metadata key {key!r} is gRPC's own")
        binary = key.endswith("-bin")
        # A value may be a secret, and is not repeated.
        if not isinstance(value, bytes if binary else str):
            raise InputError(
                f"the metadata {key!r} is a {type(value).__name__}: a value is a"
                " string, or bytes where the key ends in -bin"
            )
        if isinstance(value, str) and not (value.isascii() and value.isprintable()):
            raise InputError(f"the metadata {key!r} is not printable ASCII")
        checked.append((key, value))
    return tuple(checked)


def parse_shape(value: Any) -> tuple[int, ...]:
    """A shape from a number or a sequence of numbers.

    Raises:
        InputError: It is none.
    """
    try:
        numbers = value if isinstance(value, Iterable) else (value,)
        shape = tuple(operator.index(number) for number in numbers)
    except TypeError:
        raise InputError(f"shape is {value!r}: give whole numbers") from None
    if any(size < 0 for size in shape):
        raise InputError(f"shape is {shape}: give sizes of at least 0")
    return shape


def parse_dtype(
    value: DtypeLike, name: str, among: Collection[Dtype] = tuple(Dtype)
) -> Dtype:
    """The element type that a name, a NumPy dtype or a scalar type means.

    Args:
        value: What the caller gave.
        name: What to call it in errors.
        among: What it can be.

    Raises:
        InputError: It is none of these.
    """
    given = repr(value)
    try:
        if isinstance(value, str):
            dtype = Dtype.named(value)
        else:
            dtype = Dtype.of(np.dtype(value))
        if dtype in among:
            return dtype
        given = dtype.label
    except (KeyError, TypeError, ValueError):
        pass
    can_be = ", ".join(each.label for each in among)
    raise InputError(f"{name} is {given}; it can be {can_be}")


def _results(results: str | Iterable[str]) -> tuple[Matrix, ...]:
    if not isinstance(results, Iterable):
        raise InputError(
            f'results is {results!r}: give names, such as "y" or ("dx", "dw")'
        )
    names = (results,) if isinstance(results, str) else tuple(results)
    known = {matrix.label: matrix for matrix in RESULTS}
    for name in names:
        if not isinstance(name, str) or name not in known:
            raise InputError(f"results has {name!r}; it can have {_NAMES}")
    if not names:
        raise InputError(f"results is empty: name at least one of {_NAMES}")
    wanted = {known[name] for name in names}
    return tuple(matrix for matrix in RESULTS if matrix in wanted)


def _result_dtypes(
    spec: ResultDtypes, wanted: tuple[Matrix, ...]
) -> dict[Matrix, Dtype]:
    if spec is None:
        return {}
    if not isinstance(spec, Mapping):
        dtype = parse_dtype(spec, "result_dtype")
        return dict.fromkeys(wanted, dtype)
    by_name = {matrix.label: matrix for matrix in wanted}
    for name in spec:
        if name not in by_name:
            raise InputError(
                f"result_dtype has {name!r}, and the wanted results are"
                f" {', '.join(by_name)}"
            )
    return {
        by_name[name]: parse_dtype(value, f"result_dtype[{name!r}]")
        for name, value in spec.items()
        if value is not None
    }


def _wire_dtype(value: DtypeLike) -> Dtype | None:
    if value is None:
        return None
    return parse_dtype(value, "wire_dtype", WIRE_DTYPES)


def _accumulator(value: DtypeLike) -> Dtype | None:
    if value is None:
        return None
    return parse_dtype(value, "dw_accumulator", ACCUMULATORS)


def _checkpoint_rows(value: int | None) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
        raise InputError(
            f"checkpoint_rows is {value!r}: give a number of rows, 0 for none, or None"
        )
    return min(int(value), limits.MAX_INT64)


def _job_id(request_id: str | None) -> str:
    if request_id is None:
        return secrets.token_hex(8)
    if not isinstance(request_id, str):
        raise InputError(f"request_id is {request_id!r}: give a string")
    printable = request_id.isascii() and request_id.isprintable()
    if not request_id or not printable or len(request_id) > limits.MAX_JOB_ID_LENGTH:
        raise InputError(
            f"request_id is {request_id!r}: give 1 to {limits.MAX_JOB_ID_LENGTH}"
            " printable ASCII characters"
        )
    return request_id
