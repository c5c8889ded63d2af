"""Checks of the headers of tensors that are put."""

from __future__ import annotations

import math

from gradwire_protocol import checksum
from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.limits import (
    MAX_INT64,
    MAX_NAME_LENGTH,
    MAX_TENSOR_DIMENSIONS,
)
from gradwire_protocol.optimizers import STATES
from gradwire_protocol.v1 import matrix_pb2
from gradwire_protocol.v1 import session_service_pb2 as pb2
from gradwire_server.errors import JobError
from gradwire_server.sessions.registry import check_key, is_printable
from gradwire_server.sessions.session import Session
from gradwire_server.sessions.tensors import Contents

_SHA256_BYTES = 32

_PUT = (pb2.TENSOR_ROLE_WEIGHT, pb2.TENSOR_ROLE_GRADIENT)

_COPIES = (matrix_pb2.DTYPE_UNSPECIFIED, int(Dtype.FLOAT16), int(Dtype.BFLOAT16))


def contents_of(session: Session, header: pb2.TensorHeader) -> Contents | None:
    """Return the contents by which a tensor is shared; None: it is not shared.

    Raises:
        JobError: The header is invalid.
    """
    if not header.sha256:
        return None
    dtype = check_header(header)
    return Contents(
        session.tenant,
        session.device,
        header.sha256,
        tuple(header.shape),
        dtype,
        header.compute_dtype,
    )


def check_header(header: pb2.TensorHeader) -> Dtype:
    """Check a tensor's header by itself.

    Returns:
        The tensor's dtype.

    Raises:
        JobError: It is invalid.
    """
    try:
        dtype = Dtype(header.dtype)
    except ValueError:
        names = ", ".join(f"{each.name} ({each.value})" for each in Dtype)
        raise JobError(
            Reason.DTYPE_INVALID,
            f"header.dtype is {header.dtype}: expected one of {names}",
            field="header.dtype",
        ) from None
    shape = tuple(header.shape)
    if len(shape) > MAX_TENSOR_DIMENSIONS or min(shape, default=0) < 0:
        raise JobError(
            Reason.SHAPE_INVALID,
            f"header.shape is {shape[:16]}: expected at most {MAX_TENSOR_DIMENSIONS} "
            f"sizes of at least 0",
            field="header.shape",
        )
    # Without elements, sizes are limited alike: NumPy computes strides with them.
    if math.prod(filter(None, shape)) * dtype.itemsize > MAX_INT64:
        raise JobError(
            Reason.SHAPE_OVERFLOW,
            f"header.shape is {shape}, which has more bytes than 64 bits can count",
            field="header.shape",
        )
    if not is_printable(header.name):
        raise JobError(
            Reason.OPTION_INVALID,
            f"header.name has {len(header.name)} characters or unprintable ones: "
            f"expected at most {MAX_NAME_LENGTH} printable ASCII characters",
            field="header.name",
        )
    check_checksum(header.checksum, "header.checksum")
    check_key(header.idempotency_key, "header.idempotency_key")
    _check_frozen(header)
    allowed = _COPIES if dtype is Dtype.FLOAT32 and not header.state else _COPIES[:1]
    if header.compute_dtype not in allowed:
        raise JobError(
            Reason.DTYPE_INVALID,
            f"header.compute_dtype is {header.compute_dtype}: expected DTYPE_FLOAT16 "
            f"or DTYPE_BFLOAT16 with a float32 tensor, or none",
            field="header.compute_dtype",
        )
    return dtype


def _check_frozen(header: pb2.TensorHeader) -> None:
    """Check what a header says of a frozen tensor.

    Raises:
        JobError: It is invalid.
    """
    if header.frozen and (
        header.role != pb2.TENSOR_ROLE_WEIGHT
        or header.zeros
        or header.state
        or header.keep_states
    ):
        raise JobError(
            Reason.OPTION_INVALID,
            "header.frozen is true: expected a weight, without zeros, state and "
            "keep_states",
            field="header.frozen",
        )
    if header.sha256 and not (header.frozen and len(header.sha256) == _SHA256_BYTES):
        raise JobError(
            Reason.OPTION_INVALID,
            f"header.sha256 has {len(header.sha256)} bytes: expected {_SHA256_BYTES}, "
            f"of a frozen tensor",
            field="header.sha256",
        )


def check_checksum(number: int, path: str) -> None:
    """Check that the server offers a checksum.

    Raises:
        JobError: It does not.
    """
    known = {matrix_pb2.CHECKSUM_UNSPECIFIED}
    if checksum.AVAILABLE:
        known.add(matrix_pb2.CHECKSUM_CRC32C)
    if number not in known:
        raise JobError(
            Reason.OPTION_UNKNOWN,
            f"{path} is {number}: this server does not offer it",
            field=path,
        )


def check_role(session: Session, header: pb2.TensorHeader) -> None:
    """Check that a session has a place for a tensor.

    Raises:
        JobError: It has none.
    """
    if header.role not in _PUT:
        names = " or ".join(pb2.TensorRole.Name(role) for role in _PUT)
        raise JobError(
            Reason.OPTION_INVALID,
            f"header.role is {header.role}: expected {names}",
            field="header.role",
        )
    existing = session.tensors.get(header.tensor)
    if header.keep_states:
        same = existing is not None and (
            existing.role == header.role == pb2.TENSOR_ROLE_WEIGHT
            and existing.array.shape == tuple(header.shape)
            and existing.dtype is Dtype(header.dtype)
        )
        if not same:
            raise JobError(
                Reason.TENSOR_MISMATCH,
                f"header.keep_states is true, but tensor {header.tensor} is no weight "
                f"of this shape and dtype",
                field="header.keep_states",
            )
    if existing is not None and existing.role != header.role:
        raise JobError(
            Reason.TENSOR_MISMATCH,
            f"header.tensor is {header.tensor}, which is a tensor with another role: "
            f"drop it first, or choose a new number",
            field="header.tensor",
        )


def check_state(
    session: Session, header: pb2.TensorHeader, dtype: Dtype, shape: tuple[int, ...]
) -> None:
    """Check that a session has a place for a state.

    Raises:
        JobError: It has none.
    """
    if header.state not in STATES:
        raise JobError(
            Reason.OPTION_INVALID,
            f"header.state is {header.state[:64]!r}: expected one of "
            f"{', '.join(STATES)}",
            field="header.state",
        )
    tensor = session.tensor(header.tensor, "header.tensor")
    if tensor.role != pb2.TENSOR_ROLE_WEIGHT:
        raise JobError(
            Reason.TENSOR_MISMATCH,
            f"header.tensor is {header.tensor}, which is no weight: only weights have "
            f"states",
            field="header.tensor",
        )
    if tensor.frozen:
        raise JobError(
            Reason.TENSOR_MISMATCH,
            f"header.tensor is {header.tensor}, which is frozen and has no states",
            field="header.tensor",
        )
    if tensor.array.shape != shape or tensor.dtype is not dtype:
        raise JobError(
            Reason.TENSOR_MISMATCH,
            f"header.shape is {shape} and header.dtype {dtype.label}: tensor "
            f"{tensor.number} has shape {tensor.array.shape} and {tensor.dtype.label}",
            field="header.shape",
        )
