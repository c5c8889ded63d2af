"""The result types of gradwire. Sizes are in bytes, times in seconds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.matrices import RESULTS
from gradwire_protocol.v1.gradient_service_pb2 import GetServerInfoResponse
from gradwire_protocol.v1.job_pb2 import Accepted
from gradwire_protocol.v1.job_pb2 import Device as DeviceMessage
from gradwire_protocol.v1.job_pb2 import NumericsFingerprint as FingerprintMessage
from gradwire_protocol.v1.job_pb2 import Receipt as ReceiptMessage

Array: TypeAlias = npt.NDArray[Any]
Doubles: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Device:
    """A device that computes."""

    backend: str
    """The backend that uses the device: ``numpy``, ``cupy``, or another installed
    backend."""

    index: int
    """The backend's number for the device, from 0."""

    name: str
    """The device's name, for display."""

    memory_bytes: int
    """Memory of the device."""

    compute_capability: str = ""
    """CUDA compute capability, for example ``9.0``; empty for CPUs."""

    memory_limit_bytes: int = 0
    """Most bytes of the device's own memory that its jobs may hold together; 0 if the
    device computes in host memory."""

    sums_rounded_to_nearest: tuple[str, ...] = ()
    """Dtypes of operands for which the device rounds every addition to nearest. For
    other dtypes, `verify` allows larger errors, as on tensor cores. Empty if the server
    does not say."""

    ignores_tf32: bool = False
    """Whether ``allow_tf32`` has no effect on the device."""


@dataclass(frozen=True, slots=True)
class NumericsFingerprint:
    """Everything that affects a result's last bits, beside operands and options.

    Two jobs with equal fingerprints, options and operands give equal bits.
    """

    library: str
    """Library that computed the products, with its version."""

    device: str
    """Kind of processor."""

    threads: int
    """Number of threads that shared one product."""

    block_rows: int
    """Number of rows of a row block; 0 in `ServerInfo.fingerprints`, since it depends
    on the job."""

    segment_rows: int = 0
    """Number of rows of a segment, whose shares of dW and db are summed before those of
    other segments are added; `block_rows` for jobs without segments; 0 in
    `ServerInfo.fingerprints`."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment of a job that several servers have computed (`spread=True`)."""

    first_row: int
    """Index of its first row within the whole job."""

    rows: int
    """Number of rows."""

    server_address: str
    """Address of the server that computed it."""

    server_instance: str
    """The server process, as in `Receipt`."""

    device: Device | None
    """The device; None if the job that computed it has failed behind it."""

    attempts: int = 1
    """Number of attempts of the job with this segment, and perhaps others."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """Statistics of a finished job. Stages overlap, so their times do not add up.

    Example:
        >>> client.gradients(x, w, dy).receipt.computing_s
        0.0412
    """

    job_id: str
    """Id of the job, as in the server's log."""

    server_instance: str
    """The server process that ran the job: a new random name at each start."""

    m: int
    """Number of rows."""

    blocks: int
    """Number of row blocks computed."""

    block_rows: int
    """Number of rows of a row block. The last block may have fewer."""

    bytes_received: int
    """Bytes of operands that the server received, without framing."""

    bytes_sent: int
    """Bytes of results that the server sent, without framing."""

    queued_s: float
    """Time from the arrival of the header until the job started."""

    receiving_s: float
    """Time spent waiting for operands and receiving them."""

    copy_to_device_s: float
    """Time of copies from host memory to the device."""

    computing_s: float
    """Time of the products and the sum of dW."""

    copy_from_device_s: float
    """Time of copies from the device to host memory."""

    sending_s: float
    """Time spent sending results, including the wait for a slow reader."""

    total_s: float
    """Time from the arrival of the header to the receipt."""

    device: Device
    """The device that ran the job."""

    fingerprint: NumericsFingerprint
    """Fingerprint of the results' last bits."""

    reserved_bytes: int
    """Host memory that the server reserved for the job."""

    peak_memory_bytes: int
    """Highest resident memory of the server process so far."""

    transport: str
    """Transport of the elements: ``tcp`` or ``unix``, in messages; ``direct``, on
    connections of their own; or ``shm``, in shared memory."""

    dtype: str
    """Dtype in which the operands were sent."""

    result_dtypes: Mapping[str, str]
    """Dtype in which each result was sent, by the result's name."""

    device_bytes: int = 0
    """The device's own memory that the server reserved for the job, in addition to
    `reserved_bytes`; 0 if the device computes in host memory."""

    host_copy_bytes: int = 0
    """Bytes that the client copied between a GPU and host memory, for operands and
    results on a GPU."""

    host_copy_s: float = 0.0
    """Time of those copies."""

    attempts: int = 1
    """Number of attempts. All other fields describe the last attempt."""

    retried: tuple[str, ...] = ()
    """Why each earlier attempt failed: a reason such as ``DRAINING``, or a status such
    as ``UNAVAILABLE``."""

    server_address: str = ""
    """Address of the server that ran the job."""

    verifying_s: float = 0.0
    """Time that the client spent checking the results; 0 if it did not check them."""

    jobs: int = 1
    """Number of jobs of the call: more than 1 for batched W, or with `spread`. Then
    sizes, counts and times are sums over all jobs, which overlap; `reserved_bytes`,
    `device_bytes` and `peak_memory_bytes` are the largest; and the other fields
    describe the last job."""

    segments: tuple[Segment, ...] = ()
    """The job's segments, if it was spread over servers or devices (`spread=True`): in
    order, with who computed each. Empty for other jobs."""


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Limits of a server, or of the caller's tenant on it."""

    memory_bytes: int
    """Most bytes of host memory that all jobs together may reserve."""

    max_jobs: int
    """Most jobs that run at the same time."""

    max_queue: int
    """Most jobs that wait. Further jobs are refused with `ServerBusyError`."""

    max_columns: int
    """Largest n and k."""

    max_message_bytes: int
    """Largest payload of a message."""

    idle_timeout_s: float
    """Time without progress after which the server ends a job whose client neither
    sends nor reads."""

    early_bytes: int = 0
    """Most bytes of operands that are sent before the server accepts a job; 0: none."""

    row_block_bytes: int = 0
    """Bytes of operands for which the server sizes row blocks; 0: not stated."""

    max_keep_bytes: int = 0
    """Most bytes that one session may keep, while no other is open; 0: none."""

    max_sessions: int = 0
    """Most sessions open at once."""

    max_lease_s: float = 0.0
    """Longest lease of a session."""


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """Description of a server.

    Example:
        >>> client.server_info().devices[0].backend
        'numpy'
    """

    version: str
    """gradwire version of the server."""

    server_instance: str
    """The server process: a new random name at each start."""

    contract: str
    """The contract, for example ``gradwire.v1``."""

    features: tuple[str, ...]
    """Optional features of the contract that the server supports."""

    devices: tuple[Device, ...]
    """The server's devices."""

    backend_reason: str
    """Why the server chose its backend, as a sentence."""

    dtypes: tuple[str, ...]
    """Supported dtypes of operands: ``float32``, ..."""

    limits: ServerLimits
    """Limits of the server's jobs."""

    draining: bool
    """Whether the server accepts no new jobs because it is about to stop."""

    libraries: Mapping[str, str]
    """Versions of Python, grpcio and the computing libraries, by name."""

    fingerprints: tuple[NumericsFingerprint, ...] = ()
    """What affects the last bits on each of `devices`, in their order, whatever the
    job. Empty if the server does not say."""

    running_jobs: int = 0
    """Jobs that run on the server, of all tenants."""

    queued_jobs: int = 0
    """Jobs that wait on the server, of all tenants."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a job, passed to ``on_progress``.

    A retry resets the progress to the start of the new attempt.

    Example:
        >>> def show(progress):
        ...     print(progress.rows_sent, "of", progress.m)
        >>> client.gradients(x, w, dy, on_progress=show)
    """

    bytes_sent: int
    """Bytes of operands passed to the network."""

    bytes_to_send: int | None
    """Bytes of all operands; None while m is unknown."""

    bytes_received: int
    """Bytes of results received."""

    bytes_to_receive: int | None
    """Bytes of all wanted results; None while m is unknown."""

    rows_sent: int
    """Rows passed to the network, including the rows being passed now."""

    m: int | None
    """Total number of rows; None while it is unknown."""

    jobs_ahead: int | None
    """Number of jobs ahead of this one in the queue; None while unknown and once the
    job runs."""

    rows_by_server: Mapping[str, int] | None = None
    """With `spread`: rows of complete segments, by the address of the server that has
    computed them."""


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Results of consecutive rows.

    Example:
        >>> for block in client.stream(zip(x_parts, dy_parts), w):
        ...     y_file[block.first_row : block.first_row + len(block)] = block.y
    """

    first_row: int
    """Index of the first row within the whole job."""

    y: Any
    """The rows of Y, shape (rows, k); None if Y is not wanted."""

    dx: Any
    """The rows of dX, shape (rows, n); None if dX is not wanted."""

    def __len__(self) -> int:
        """Number of rows."""
        some = self.dx if self.y is None else self.y
        return 0 if some is None else len(some)


class _ThreeResults(NamedTuple):
    y: Any
    dx: Any
    dw: Any


class Gradients(_ThreeResults):
    """The results of `gradients`: a tuple (y, dx, dw). Unwanted results are None.

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
        """Create the tuple of two results with its receipt."""
        self = super().__new__(cls, dx, dw)
        self.receipt = receipt
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        return (*self, self.receipt)


def device_of(message: DeviceMessage) -> Device:
    """Convert the contract's device message."""
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


def _fingerprint(message: FingerprintMessage) -> NumericsFingerprint:
    """Convert the contract's fingerprint message."""
    return NumericsFingerprint(
        message.library,
        message.device,
        message.threads,
        message.block_rows,
        message.segment_rows,
    )


def receipt_of(message: ReceiptMessage, accepted: Accepted) -> Receipt:
    """Convert the contract's receipt message, with fields of the earlier Accepted."""
    job = accepted.effective_job
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
        fingerprint=_fingerprint(accepted.fingerprint),
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


def merged_receipt(receipts: Sequence[Receipt]) -> Receipt:
    """Return the receipt of a call from those of its jobs, at least one."""
    last = receipts[-1]
    if len(receipts) == 1:
        return last
    sums = {name: sum(getattr(each, name) for each in receipts) for name in _SUMMED}
    largest = {name: max(getattr(each, name) for each in receipts) for name in _LARGEST}
    retried = tuple(reason for each in receipts for reason in each.retried)
    changed: dict[str, Any] = {**sums, **largest}
    return replace(
        last, **changed, attempts=1 + len(retried), retried=retried, jobs=len(receipts)
    )


def spread_receipt(
    receipts: Sequence[Receipt],
    segments: Sequence[Segment],
    *,
    m: int,
    job_id: str,
    segment_rows: int,
    result_dtypes: Mapping[str, str],
) -> Receipt:
    """Return the receipt of a spread job from those of its jobs, at least one."""
    merged = merged_receipt(receipts)
    return replace(
        merged,
        m=m,
        job_id=job_id,
        segments=tuple(segments),
        fingerprint=replace(merged.fingerprint, segment_rows=segment_rows),
        result_dtypes=result_dtypes,
    )


_SUMMED = (
    *("m", "blocks", "bytes_received", "bytes_sent", "queued_s", "receiving_s"),
    *("copy_to_device_s", "computing_s", "copy_from_device_s", "sending_s"),
    *("total_s", "verifying_s"),
)
_LARGEST = ("reserved_bytes", "device_bytes", "peak_memory_bytes")


def server_info_of(message: GetServerInfoResponse) -> ServerInfo:
    """Convert the contract's server-info message."""
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
            early_bytes=message.limits.early_bytes,
            row_block_bytes=message.limits.row_block_bytes,
            max_keep_bytes=message.limits.max_keep_bytes,
            max_sessions=message.limits.max_sessions,
            max_lease_s=message.limits.max_lease_seconds,
        ),
        draining=message.draining,
        libraries=dict(message.libraries),
        fingerprints=tuple(_fingerprint(each) for each in message.fingerprints),
        running_jobs=message.running_jobs,
        queued_jobs=message.queued_jobs,
    )


def _labels(numbers: Iterable[int]) -> tuple[str, ...]:
    """Return the names of dtypes, without dtypes unknown to this version."""
    return tuple(_LABELS[number] for number in numbers if number in _LABELS)


# A table, as every receipt of a small call is converted.
_LABELS = {int(dtype): dtype.label for dtype in Dtype}
