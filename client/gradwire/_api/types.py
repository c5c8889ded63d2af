"""What gradwire hands to its callers beside arrays and exceptions.

Bytes are bytes, and every time is in seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.matrices import RESULTS
from gradwire_protocol.v1.gradient_service_pb2 import GetServerInfoResponse
from gradwire_protocol.v1.job_pb2 import Accepted
from gradwire_protocol.v1.job_pb2 import Device as DeviceMessage
from gradwire_protocol.v1.job_pb2 import Receipt as ReceiptMessage

Array: TypeAlias = npt.NDArray[Any]
Doubles: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Device:
    """A device that computes."""

    backend: str
    """The backend that drives it: ``numpy``, ``cupy``, or another that is
    installed with the server."""

    index: int
    """The backend's own number for it, from 0."""

    name: str
    """Its name, for people."""

    memory_bytes: int
    """Its memory."""

    compute_capability: str = ""
    """What it can do, by CUDA's number for it: ``9.0``; empty for CPUs."""

    memory_limit_bytes: int = 0
    """Most of its own memory that the jobs on it may hold together; 0 where it
    computes in the host's memory."""

    sums_rounded_to_nearest: tuple[str, ...] = ()
    """Element types of operands whose products it sums with every addition
    rounded to nearest. `verify` allows sums of others more: what tensor cores
    lose. Empty where the server does not say."""

    ignores_tf32: bool = False
    """Whether ``allow_tf32`` has no effect on it."""


@dataclass(frozen=True, slots=True)
class NumericsFingerprint:
    """What a result's last bits depend on, beside operands and options.

    Two jobs with equal fingerprints, options and operands give equal bits.
    """

    library: str
    """The library that computed the products, with its version."""

    device: str
    """The kind of processor that it ran on."""

    threads: int
    """Threads that shared one product."""

    block_rows: int
    """Rows of a block."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of a job. Its stages overlap, so their times do not add up.

    Example:
        >>> client.gradients(x, w, dy).receipt.computing_s
        0.0412
    """

    job_id: str
    """The job's id, in the server's log too."""

    server_instance: str
    """The server process that ran it: a fresh random name each start."""

    m: int
    """Rows that were computed."""

    blocks: int
    """Row blocks that were computed."""

    block_rows: int
    """Rows of a block; the last one may have fewer."""

    bytes_received: int
    """Bytes of operands that the server received, without framing."""

    bytes_sent: int
    """Bytes of results that the server sent, without framing."""

    queued_s: float
    """From the header's arrival until the job ran."""

    receiving_s: float
    """Waiting for operands and taking them in."""

    copy_to_device_s: float
    """Copies from the host's memory to the device."""

    computing_s: float
    """The products and the sum of dW."""

    copy_from_device_s: float
    """Copies from the device to the host's memory."""

    sending_s: float
    """Handing results to the network, with the wait for a slow reader."""

    total_s: float
    """From the header's arrival to the receipt."""

    device: Device
    """Where the job ran."""

    fingerprint: NumericsFingerprint
    """What the results' last bits depend on."""

    reserved_bytes: int
    """The host's memory that the server held for the job."""

    peak_memory_bytes: int
    """Highest resident memory of the server process so far."""

    transport: str
    """How the elements travelled: ``tcp``, ``unix``, or ``shm`` (shared memory)."""

    dtype: str
    """Element type in which the operands travelled."""

    result_dtypes: Mapping[str, str]
    """Element types in which the results travelled, by their names."""

    device_bytes: int = 0
    """The device's own memory that the server held for the job, beside
    `reserved_bytes`; 0 where it computed in the host's memory."""

    host_copy_bytes: int = 0
    """Bytes that this client copied between a GPU's memory and the host's: of
    operands that lay there, and of results that `out` wanted there."""

    host_copy_s: float = 0.0
    """How long those copies took, beside everything else."""

    attempts: int = 1
    """How often the job was tried; all else here is of the last attempt."""

    retried: tuple[str, ...] = ()
    """Why each attempt before it failed: a reason such as ``DRAINING``, or else
    a status such as ``UNAVAILABLE``."""

    server_address: str = ""
    """Where this client reached the server that ran it."""

    verifying_s: float = 0.0
    """How long this client took to check the results; 0 where it did not."""


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What one server allows, and where it asks for a token, its tenant of it."""

    memory_bytes: int
    """Most bytes of the host's memory that all its jobs together may reserve."""

    max_jobs: int
    """Most jobs that run at once."""

    max_queue: int
    """Most jobs that wait; one more is refused as busy."""

    max_columns: int
    """Largest n and largest k."""

    max_message_bytes: int
    """Largest payload of a message."""

    idle_timeout_s: float
    """Without progress for so long, a job whose client does not send, or
    does not read, is ended."""


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server is, offers and allows.

    Example:
        >>> client.server_info().devices[0].backend
        'numpy'
    """

    version: str
    """Version of gradwire that serves."""

    server_instance: str
    """The server process: a fresh random name each start."""

    contract: str
    """The contract that is served: ``gradwire.v1``."""

    features: tuple[str, ...]
    """Optional features of the contract that it has."""

    devices: tuple[Device, ...]
    """The devices that compute."""

    backend_reason: str
    """Why its backend was chosen, in a sentence."""

    dtypes: tuple[str, ...]
    """Element types that it takes: ``float32``, ..."""

    limits: ServerLimits
    """What a job may ask for."""

    draining: bool
    """Whether it takes no new jobs because it is about to stop."""

    libraries: Mapping[str, str]
    """Versions of Python, grpcio and the libraries that compute, by name."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job has come, as ``on_progress`` is told.

    When a job is tried again, it steps back to where the new attempt begins.

    Example:
        >>> def show(progress):
        ...     print(progress.rows_sent, "of", progress.m)
        >>> client.gradients(x, w, dy, on_progress=show)
    """

    bytes_sent: int
    """Bytes of operands that were handed to the network."""

    bytes_to_send: int | None
    """Bytes of all operands; None while m is unknown."""

    bytes_received: int
    """Bytes of results that came back."""

    bytes_to_receive: int | None
    """Bytes of all wanted results; None while m is unknown."""

    rows_sent: int
    """Rows that were handed to the network, or are being."""

    m: int | None
    """All rows; None while that is unknown."""

    jobs_ahead: int | None
    """Jobs that run before this one while it waits; None once it runs, and
    before the server has said."""


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Results of consecutive rows.

    Example:
        >>> for block in client.stream(zip(x_parts, dy_parts), w):
        ...     y_file[block.first_row : block.first_row + len(block)] = block.y
    """

    first_row: int
    """Index of the first row within the whole job."""

    y: Array | None
    """Those rows of Y, shape (rows, k); None where Y is not wanted."""

    dx: Array | None
    """Those rows of dX, shape (rows, n); None where dX is not wanted."""

    def __len__(self) -> int:
        """Number of rows."""
        some = self.dx if self.y is None else self.y
        return 0 if some is None else some.shape[0]


class _ThreeResults(NamedTuple):
    y: Any
    dx: Any
    dw: Any


class Gradients(_ThreeResults):
    """The results of `gradients`: a tuple (y, dx, dw), None where not wanted.

    `db` is no element of the tuple.

    Example:
        >>> result = client.gradients(x, w, dy)
        >>> y, dx, dw = result
        >>> result.receipt.blocks
        1
    """

    receipt: Receipt
    """What became of the job."""

    db: Any
    """The column sums of dY, shape (k,): the gradient of a bias. None where not
    wanted."""

    def __new__(
        cls, y: Any, dx: Any, dw: Any, receipt: Receipt, db: Any = None
    ) -> Gradients:
        """The results with their receipt."""
        self = super().__new__(cls, y, dx, dw)
        self.receipt = receipt
        self.db = db
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        return (*self, self.receipt, self.db)


class _TwoResults(NamedTuple):
    dx: Any
    dw: Any


class Backward(_TwoResults):
    """The results of `backward`: a tuple (dx, dw).

    Example:
        >>> dx, dw = client.backward(x, w, dy)
    """

    receipt: Receipt
    """What became of the job."""

    def __new__(cls, dx: Any, dw: Any, receipt: Receipt) -> Backward:
        """The two results with their receipt."""
        self = super().__new__(cls, dx, dw)
        self.receipt = receipt
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        return (*self, self.receipt)


def device_of(message: DeviceMessage) -> Device:
    """A device as the contract writes it."""
    return Device(
        message.backend,
        message.index,
        message.name,
        message.memory_bytes,
        message.compute_capability,
        message.memory_limit_bytes,
        _labels(message.sums_rounded_to_nearest),
        message.ignores_tf32,
    )


def receipt_of(message: ReceiptMessage, accepted: Accepted) -> Receipt:
    """A receipt as the contract writes it, with what Accepted said before."""
    fingerprint, job = accepted.fingerprint, accepted.effective_job
    return Receipt(
        job_id=message.job_id,
        server_instance=message.server_instance,
        m=message.m,
        blocks=message.blocks,
        block_rows=accepted.block_rows,
        bytes_received=message.bytes_received,
        bytes_sent=message.bytes_sent,
        queued_s=message.queued_seconds,
        receiving_s=message.receiving_seconds,
        copy_to_device_s=message.copy_to_device_seconds,
        computing_s=message.computing_seconds,
        copy_from_device_s=message.copy_from_device_seconds,
        sending_s=message.sending_seconds,
        total_s=message.total_seconds,
        device=device_of(message.device),
        fingerprint=NumericsFingerprint(
            fingerprint.library,
            fingerprint.device,
            fingerprint.threads,
            fingerprint.block_rows,
        ),
        reserved_bytes=accepted.reserved_bytes,
        peak_memory_bytes=message.peak_memory_bytes,
        transport=message.transport,
        dtype=Dtype(int(job.dtype)).label,
        result_dtypes={
            result.label: Dtype(int(getattr(job, result.label).dtype)).label
            for result in RESULTS
            if job.HasField(result.label)
        },
        device_bytes=accepted.device_bytes,
    )


def server_info_of(message: GetServerInfoResponse) -> ServerInfo:
    """A server's answer about itself."""
    return ServerInfo(
        version=message.version,
        server_instance=message.server_instance,
        contract=message.contract,
        features=tuple(message.features),
        devices=tuple(device_of(device) for device in message.devices),
        backend_reason=message.backend_reason,
        dtypes=_labels(message.dtypes),
        limits=ServerLimits(
            memory_bytes=message.limits.memory_bytes,
            max_jobs=message.limits.max_jobs,
            max_queue=message.limits.max_queue,
            max_columns=message.limits.max_columns,
            max_message_bytes=message.limits.max_message_bytes,
            idle_timeout_s=message.limits.idle_timeout_seconds,
        ),
        draining=message.draining,
        libraries=dict(message.libraries),
    )


def _labels(numbers: Iterable[int]) -> tuple[str, ...]:
    """Names of element types; those that this version does not know are left out."""
    known = {int(dtype) for dtype in Dtype}
    return tuple(Dtype(number).label for number in numbers if number in known)
