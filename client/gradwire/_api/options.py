"""The options of a call, validated and normalized."""

from __future__ import annotations

import math
import operator
import re
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, TypedDict, Unpack

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
BlockRows: TypeAlias = int | Literal["auto"]

_LONGEST_TIMEOUT_S = 365 * 86_400.0
"""Longest timeout passed to gRPC, which cannot represent much longer ones."""

TRANSPORTS = ("auto", "grpc", "direct", "shm")

_DEFAULT_RESULTS = tuple(matrix.label for matrix in DEFAULT_RESULTS)
_NAMES = ", ".join(matrix.label for matrix in RESULTS)

_LEAST_TIMEOUT_S = 0.001
MAX_METADATA_BYTES = 7 * 1024
"""Most bytes of a call's metadata, including the token."""

TRACE_KEYS = ("traceparent", "tracestate")
"""Keys of the metadata that names the caller's span (W3C Trace Context)."""

_METADATA_KEY = re.compile(r"[0-9a-z_.-]+")


@dataclass(frozen=True, slots=True)
class Numerics:
    """What the last bits of a server's results depend on, beside the job."""

    library: str
    """Library of the products, with its version."""

    device: str
    """Kind of processor."""

    threads: int
    """Threads that share one product."""

    row_block_bytes: int
    """Size of a row block's operands, on which its rows depend."""

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        mib = self.row_block_bytes / (1 << 20)
        return f"{self.library} on {self.device}, {threads}, row blocks of {mib:g} MiB"


@dataclass(frozen=True, slots=True)
class Options:
    """The validated options of a call."""

    results: tuple[Matrix, ...]
    """Wanted results, in the order Y, dX, dW, dB."""

    result_dtypes: Mapping[Matrix, Dtype]
    """Dtypes of results whose dtype differs from the operands'."""

    wire_dtype: Dtype | None
    """Dtype in which float32 operands are sent, and results not in `result_dtypes`;
    None: unchanged."""

    dw_accumulator: Dtype | None
    """Dtype in which dW is summed; None: the contract's default."""

    allow_tf32: bool
    """Whether float32 products may use TF32."""

    checksum: bool
    """Whether every payload carries a CRC-32C."""

    verify: Verify | None
    """How the client checks results; None: the client's default."""

    timeout_s: float | None
    """Seconds for the whole call; None: no limit."""

    on_progress: OnProgress | None
    """Called with the progress of the job; None: not called."""

    job_id: str
    """Id of the job, from the caller or generated."""

    metadata: tuple[tuple[str, str | bytes], ...] = field(repr=False)
    """Metadata of the call. It may contain secrets, so it is not in the repr."""

    checkpoint_rows: int | None = None
    """Rows between two checkpoints of dW's sum; None: chosen automatically."""

    block_rows: BlockRows | None = None
    """Most rows of a row block; "auto": chosen for a slow link; 0: the server's choice;
    None: the client's default."""

    spread: bool = False
    """Whether all servers and devices compute segments of the job."""

    numerics: Numerics | None = None
    """What every server of the job must have; None: anything."""


@dataclass(frozen=True)
class CallOptions:
    """The options of a call that is no job."""

    timeout_s: float | None
    """Seconds for the call; None: no limit."""

    metadata: MetadataPairs = field(repr=False)
    """Metadata of the call."""

    job_id: str | None = None


class ForwardOptions(TypedDict, total=False):
    """The options of `Client.forward`, common to all calls; see `Client.gradients`."""

    result_dtype: ResultDtypes
    wire_dtype: DtypeLike
    allow_tf32: bool
    checksum: bool
    verify: VerifyLike
    timeout_s: float | None
    on_progress: OnProgress | None
    request_id: str | None
    metadata: Metadata
    block_rows: BlockRows | None
    spread: bool


class SessionJobOptions(TypedDict, total=False):
    """The options of `Session.forward` and `Session.backward`."""

    result_dtype: ResultDtypes
    wire_dtype: DtypeLike
    dw_accumulator: DtypeLike
    allow_tf32: bool
    checksum: bool
    timeout_s: float | None
    on_progress: OnProgress | None
    request_id: str | None
    metadata: Metadata
    block_rows: BlockRows | None


class SessionGradientsOptions(SessionJobOptions, total=False):
    """The options of `Session.gradients`."""

    results: str | Iterable[str]


class BackwardOptions(ForwardOptions, total=False):
    """The options of `Client.backward`."""

    dw_accumulator: DtypeLike
    checkpoint_rows: int | None


class GradientsOptions(BackwardOptions, total=False):
    """The options of `Client.gradients` and `Client.stream`."""

    results: str | Iterable[str]


def check_names(call: str, given: Mapping[str, Any], known: Any) -> None:
    """Check the names of keyword arguments, as Python does for a signature.

    Args:
        call: The function's name.
        given: The arguments.
        known: A TypedDict of those that it has.

    Raises:
        TypeError: A name is unknown.
    """
    names = known.__required_keys__ | known.__optional_keys__
    for name in given:
        if name not in names:
            raise TypeError(f"{call}() got an unexpected keyword argument {name!r}")


def parse_options(**given: Unpack[GradientsOptions]) -> Options:
    """Validate the options of a call.

    Raises:
        InputError: A value is invalid; the message names its option.
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
        raise InputError(f"on_progress is {on_progress!r}: expected a callable")
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
        block_rows=parse_block_rows(given.get("block_rows")),
        spread=bool(given.get("spread")),
    )


def parse_timeout(value: float | None, name: str) -> float | None:
    """Return a timeout in seconds, at most a year, or None if `value` is None.

    Raises:
        InputError: The value is not a positive number.
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
        raise InputError(
            f"{name} is {value!r}: expected a number of seconds above 0, or None"
        )
    return min(seconds, _LONGEST_TIMEOUT_S)


def parse_transport(value: str) -> str:
    """Return the transport of elements: "auto", "grpc", "direct" or "shm".

    Raises:
        InputError: The value is none of them.
    """
    if not isinstance(value, str) or value not in TRANSPORTS:
        raise InputError(
            f"transport is {value!r}: expected one of {', '.join(TRANSPORTS)}"
        )
    return value


def parse_block_rows(value: BlockRows | None) -> BlockRows | None:
    """Return the most rows of a row block, as in `Options`.

    Raises:
        InputError: The value is neither "auto", a power of two, 0 nor None.
    """
    if value is None or (isinstance(value, str) and value == "auto"):
        return value
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        rows = int(value)
        if 0 <= rows <= limits.MAX_INT64 and rows & (rows - 1) == 0:
            return rows
    raise InputError(
        f'block_rows is {value!r}: expected a power of two, "auto", 0 or None'
    )


def left_of(options: Options, begun: float) -> Options:
    """Return `options` with the time left of a call that began at time `begun`."""
    if options.timeout_s is None:
        return options
    left = options.timeout_s - (time.monotonic() - begun)
    return replace(options, timeout_s=max(left, _LEAST_TIMEOUT_S))


def deadline_of(timeout_s: float | None) -> float | None:
    """Return when a call that begins now is late; `time.monotonic`. None: never."""
    return None if timeout_s is None else time.monotonic() + timeout_s


def at_most(seconds: float, left_s: float | None) -> float:
    """Return the smaller of `seconds` and `left_s`, but more than 0."""
    return seconds if left_s is None else max(_LEAST_TIMEOUT_S, min(seconds, left_s))


def within(seconds: float | None, left_s: float | None) -> float | None:
    """Return the smaller of two numbers of seconds; None: no limit."""
    return left_s if seconds is None else at_most(seconds, left_s)


def parse_metadata(metadata: Metadata) -> tuple[tuple[str, str | bytes], ...]:
    """Return metadata as pairs for gRPC, from ``{"traceparent": "00-..."}`` or pairs.

    Raises:
        InputError: The value is neither, or gRPC would refuse a key or a value.
    """
    pairs: Any = metadata.items() if isinstance(metadata, Mapping) else metadata
    if not isinstance(pairs, Iterable):
        raise InputError(
            f"metadata is {metadata!r}: expected a mapping or pairs (key, value)"
        )
    checked = []
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise InputError(f"metadata has {pair!r}: expected pairs (key, value)")
        key, value = pair
        if not isinstance(key, str) or not _METADATA_KEY.fullmatch(key):
            raise InputError(
                f"the metadata key {key!r} is invalid: expected lower-case letters,"
                " digits and the signs - _ ."
            )
        if key.startswith("grpc-"):
            raise InputError(f"the metadata key {key!r} is reserved for gRPC")
        binary = key.endswith("-bin")
        # The message omits the value, which may be a secret.
        if not isinstance(value, bytes if binary else str):
            raise InputError(
                f"the metadata value of {key!r} is a {type(value).__name__}: expected"
                " a string, or bytes for keys ending in -bin"
            )
        if isinstance(value, str) and not (value.isascii() and value.isprintable()):
            raise InputError(f"the metadata value of {key!r} is not printable ASCII")
        checked.append((key, value))
    check_metadata_size(checked)
    return tuple(checked)


def check_metadata_size(pairs: Iterable[tuple[str, str | bytes]]) -> None:
    """Check that gRPC accepts metadata of this size.

    gRPC refuses calls with more than 8 KiB at random, and with more than 16 KiB
    always. Its own headers take up to 1 KiB.

    Raises:
        InputError: The metadata is too large.
    """
    size = metadata_bytes(pairs)
    if size > MAX_METADATA_BYTES:
        raise InputError(
            f"metadata has {size} bytes, with its keys and the token: expected at most"
            f" {MAX_METADATA_BYTES}"
        )


def metadata_bytes(pairs: Iterable[tuple[str, str | bytes]]) -> int:
    """Return the size of metadata, as gRPC counts it."""
    # RFC 9113, section 6.5.2: an entry counts its name, its value and 32 bytes.
    # gRPC sends bytes in base64.
    return sum(
        len(key) + 32 + (len(value) if isinstance(value, str) else len(value) * 4 // 3)
        for key, value in pairs
    )


def parse_shape(value: Any) -> tuple[int, ...]:
    """Return a shape from a number or a sequence of numbers.

    Raises:
        InputError: The value is not a shape.
    """
    try:
        numbers = value if isinstance(value, Iterable) else (value,)
        shape = tuple(operator.index(number) for number in numbers)
    except TypeError:
        raise InputError(f"shape is {value!r}: expected integers") from None
    if any(size < 0 for size in shape):
        raise InputError(f"shape is {shape}: expected sizes of at least 0")
    return shape


_ALIASES = {"bf16": Dtype.BFLOAT16, "fp16": Dtype.FLOAT16, "fp32": Dtype.FLOAT32}
"""Names that NumPy does not have."""


def _named_or_numpy(label: str) -> Dtype:
    try:
        return Dtype.named(label)
    except KeyError:
        if label == "float":  # float64 to NumPy, float32 to PyTorch
            raise
        return Dtype.of(np.dtype(label))  # "f4", "half", "double"


def parse_dtype(
    value: DtypeLike, name: str, among: Collection[Dtype] = tuple(Dtype)
) -> Dtype:
    """Return the dtype for a name, a NumPy dtype or a scalar type.

    Args:
        value: The caller's value.
        name: Name of the option, for errors.
        among: The accepted dtypes.

    Raises:
        InputError: The value is none of these.
    """
    given = repr(value)
    try:
        if type(value).__module__ == "torch":  # torch.bfloat16
            dtype = Dtype.named(str(value).removeprefix("torch."))
        elif isinstance(value, str):
            label = value.removeprefix("torch.")
            dtype = _ALIASES.get(label) or _named_or_numpy(label)
        else:
            dtype = Dtype.of(np.dtype(value))
        if dtype in among:
            return dtype
        given = dtype.label
    except (KeyError, TypeError, ValueError):
        pass
    can_be = ", ".join(each.label for each in among)
    raise InputError(f"{name} is {given}: expected one of {can_be}")


def _results(results: str | Iterable[str]) -> tuple[Matrix, ...]:
    if not isinstance(results, Iterable):
        raise InputError(
            f'results is {results!r}: expected names, such as "y" or ("dx", "dw")'
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
                f"result_dtype has {name!r}: expected one of the wanted results,"
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
            f"checkpoint_rows is {value!r}: expected an integer of at least 0, or None"
        )
    return min(int(value), limits.MAX_INT64)


def _job_id(request_id: str | None) -> str:
    if request_id is None:
        return secrets.token_hex(8)
    if not isinstance(request_id, str):
        raise InputError(f"request_id is {request_id!r}: expected a string")
    printable = request_id.isascii() and request_id.isprintable()
    if not request_id or not printable or len(request_id) > limits.MAX_JOB_ID_LENGTH:
        raise InputError(
            f"request_id is {request_id!r}: expected 1 to {limits.MAX_JOB_ID_LENGTH}"
            " printable ASCII characters"
        )
    return request_id
