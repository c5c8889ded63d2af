from gradwire_protocol.v1 import matrix_pb2 as _matrix_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Job(_message.Message):
    __slots__ = ("job_id", "m", "n", "k", "dtype", "x", "w", "dy", "y", "dx", "dw", "numerics", "checksum", "max_chunk_bytes", "required_features", "regions", "checkpoints", "resume", "db", "block_rows", "session", "direct", "segment_sums")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    M_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    X_FIELD_NUMBER: _ClassVar[int]
    W_FIELD_NUMBER: _ClassVar[int]
    DY_FIELD_NUMBER: _ClassVar[int]
    Y_FIELD_NUMBER: _ClassVar[int]
    DX_FIELD_NUMBER: _ClassVar[int]
    DW_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    MAX_CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    REQUIRED_FEATURES_FIELD_NUMBER: _ClassVar[int]
    REGIONS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    DB_FIELD_NUMBER: _ClassVar[int]
    BLOCK_ROWS_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    DIRECT_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_SUMS_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    m: int
    n: int
    k: int
    dtype: _matrix_pb2.Dtype
    x: Operand
    w: Operand
    dy: Operand
    y: Result
    dx: Result
    dw: Result
    numerics: Numerics
    checksum: _matrix_pb2.Checksum
    max_chunk_bytes: int
    required_features: _containers.RepeatedScalarFieldContainer[str]
    regions: _containers.RepeatedCompositeFieldContainer[SharedRegion]
    checkpoints: Checkpoints
    resume: Resume
    db: Result
    block_rows: int
    session: SessionRef
    direct: DirectOffer
    segment_sums: bool
    def __init__(self, job_id: _Optional[str] = ..., m: _Optional[int] = ..., n: _Optional[int] = ..., k: _Optional[int] = ..., dtype: _Optional[_Union[_matrix_pb2.Dtype, str]] = ..., x: _Optional[_Union[Operand, _Mapping]] = ..., w: _Optional[_Union[Operand, _Mapping]] = ..., dy: _Optional[_Union[Operand, _Mapping]] = ..., y: _Optional[_Union[Result, _Mapping]] = ..., dx: _Optional[_Union[Result, _Mapping]] = ..., dw: _Optional[_Union[Result, _Mapping]] = ..., numerics: _Optional[_Union[Numerics, _Mapping]] = ..., checksum: _Optional[_Union[_matrix_pb2.Checksum, str]] = ..., max_chunk_bytes: _Optional[int] = ..., required_features: _Optional[_Iterable[str]] = ..., regions: _Optional[_Iterable[_Union[SharedRegion, _Mapping]]] = ..., checkpoints: _Optional[_Union[Checkpoints, _Mapping]] = ..., resume: _Optional[_Union[Resume, _Mapping]] = ..., db: _Optional[_Union[Result, _Mapping]] = ..., block_rows: _Optional[int] = ..., session: _Optional[_Union[SessionRef, _Mapping]] = ..., direct: _Optional[_Union[DirectOffer, _Mapping]] = ..., segment_sums: bool = ...) -> None: ...

class DirectOffer(_message.Message):
    __slots__ = ("connections",)
    CONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    connections: int
    def __init__(self, connections: _Optional[int] = ...) -> None: ...

class DirectAccess(_message.Message):
    __slots__ = ("addresses", "token", "connections", "tls", "max_frame_bytes")
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    CONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    TLS_FIELD_NUMBER: _ClassVar[int]
    MAX_FRAME_BYTES_FIELD_NUMBER: _ClassVar[int]
    addresses: _containers.RepeatedScalarFieldContainer[str]
    token: bytes
    connections: int
    tls: bool
    max_frame_bytes: int
    def __init__(self, addresses: _Optional[_Iterable[str]] = ..., token: _Optional[bytes] = ..., connections: _Optional[int] = ..., tls: bool = ..., max_frame_bytes: _Optional[int] = ...) -> None: ...

class SessionRef(_message.Message):
    __slots__ = ("session", "step")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    session: str
    step: int
    def __init__(self, session: _Optional[str] = ..., step: _Optional[int] = ...) -> None: ...

class Checkpoints(_message.Message):
    __slots__ = ("rows",)
    ROWS_FIELD_NUMBER: _ClassVar[int]
    rows: int
    def __init__(self, rows: _Optional[int] = ...) -> None: ...

class Resume(_message.Message):
    __slots__ = ("fingerprint", "first_row", "results_from_row", "dw_sum", "db_sum")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    FIRST_ROW_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FROM_ROW_FIELD_NUMBER: _ClassVar[int]
    DW_SUM_FIELD_NUMBER: _ClassVar[int]
    DB_SUM_FIELD_NUMBER: _ClassVar[int]
    fingerprint: NumericsFingerprint
    first_row: int
    results_from_row: int
    dw_sum: Operand
    db_sum: Operand
    def __init__(self, fingerprint: _Optional[_Union[NumericsFingerprint, _Mapping]] = ..., first_row: _Optional[int] = ..., results_from_row: _Optional[int] = ..., dw_sum: _Optional[_Union[Operand, _Mapping]] = ..., db_sum: _Optional[_Union[Operand, _Mapping]] = ...) -> None: ...

class Checkpoint(_message.Message):
    __slots__ = ("rows",)
    ROWS_FIELD_NUMBER: _ClassVar[int]
    rows: int
    def __init__(self, rows: _Optional[int] = ...) -> None: ...

class SharedRegion(_message.Message):
    __slots__ = ("token",)
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    token: str
    def __init__(self, token: _Optional[str] = ...) -> None: ...

class Operand(_message.Message):
    __slots__ = ("inline", "shared", "kept", "keep")
    INLINE_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    inline: InlineSource
    shared: SharedSource
    kept: KeptSource
    keep: KeepAs
    def __init__(self, inline: _Optional[_Union[InlineSource, _Mapping]] = ..., shared: _Optional[_Union[SharedSource, _Mapping]] = ..., kept: _Optional[_Union[KeptSource, _Mapping]] = ..., keep: _Optional[_Union[KeepAs, _Mapping]] = ...) -> None: ...

class KeptSource(_message.Message):
    __slots__ = ("tensor", "last_use")
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    LAST_USE_FIELD_NUMBER: _ClassVar[int]
    tensor: int
    last_use: bool
    def __init__(self, tensor: _Optional[int] = ..., last_use: bool = ...) -> None: ...

class KeepAs(_message.Message):
    __slots__ = ("tensor",)
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    tensor: int
    def __init__(self, tensor: _Optional[int] = ...) -> None: ...

class SharedSource(_message.Message):
    __slots__ = ("region", "offset_bytes")
    REGION_FIELD_NUMBER: _ClassVar[int]
    OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    region: int
    offset_bytes: int
    def __init__(self, region: _Optional[int] = ..., offset_bytes: _Optional[int] = ...) -> None: ...

class InlineSource(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Result(_message.Message):
    __slots__ = ("dtype", "inline", "shared", "kept")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    INLINE_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    dtype: _matrix_pb2.Dtype
    inline: InlineDestination
    shared: SharedDestination
    kept: KeptDestination
    def __init__(self, dtype: _Optional[_Union[_matrix_pb2.Dtype, str]] = ..., inline: _Optional[_Union[InlineDestination, _Mapping]] = ..., shared: _Optional[_Union[SharedDestination, _Mapping]] = ..., kept: _Optional[_Union[KeptDestination, _Mapping]] = ...) -> None: ...

class KeptDestination(_message.Message):
    __slots__ = ("tensor", "add")
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    ADD_FIELD_NUMBER: _ClassVar[int]
    tensor: int
    add: Contribution
    def __init__(self, tensor: _Optional[int] = ..., add: _Optional[_Union[Contribution, _Mapping]] = ...) -> None: ...

class Contribution(_message.Message):
    __slots__ = ("step", "part", "parts")
    STEP_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    step: int
    part: int
    parts: int
    def __init__(self, step: _Optional[int] = ..., part: _Optional[int] = ..., parts: _Optional[int] = ...) -> None: ...

class SharedDestination(_message.Message):
    __slots__ = ("region", "offset_bytes")
    REGION_FIELD_NUMBER: _ClassVar[int]
    OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    region: int
    offset_bytes: int
    def __init__(self, region: _Optional[int] = ..., offset_bytes: _Optional[int] = ...) -> None: ...

class InlineDestination(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Numerics(_message.Message):
    __slots__ = ("dw_accumulator", "allow_tf32", "dw_segment_rows")
    DW_ACCUMULATOR_FIELD_NUMBER: _ClassVar[int]
    ALLOW_TF32_FIELD_NUMBER: _ClassVar[int]
    DW_SEGMENT_ROWS_FIELD_NUMBER: _ClassVar[int]
    dw_accumulator: _matrix_pb2.Dtype
    allow_tf32: bool
    dw_segment_rows: int
    def __init__(self, dw_accumulator: _Optional[_Union[_matrix_pb2.Dtype, str]] = ..., allow_tf32: bool = ..., dw_segment_rows: _Optional[int] = ...) -> None: ...

class End(_message.Message):
    __slots__ = ("m",)
    M_FIELD_NUMBER: _ClassVar[int]
    m: int
    def __init__(self, m: _Optional[int] = ...) -> None: ...

class Queued(_message.Message):
    __slots__ = ("jobs_ahead",)
    JOBS_AHEAD_FIELD_NUMBER: _ClassVar[int]
    jobs_ahead: int
    def __init__(self, jobs_ahead: _Optional[int] = ...) -> None: ...

class Accepted(_message.Message):
    __slots__ = ("server_instance", "block_rows", "window_rows", "reserved_bytes", "device", "fingerprint", "effective_job", "device_bytes", "credit_blocks", "direct")
    SERVER_INSTANCE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_ROWS_FIELD_NUMBER: _ClassVar[int]
    WINDOW_ROWS_FIELD_NUMBER: _ClassVar[int]
    RESERVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    EFFECTIVE_JOB_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CREDIT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DIRECT_FIELD_NUMBER: _ClassVar[int]
    server_instance: str
    block_rows: int
    window_rows: int
    reserved_bytes: int
    device: Device
    fingerprint: NumericsFingerprint
    effective_job: Job
    device_bytes: int
    credit_blocks: int
    direct: DirectAccess
    def __init__(self, server_instance: _Optional[str] = ..., block_rows: _Optional[int] = ..., window_rows: _Optional[int] = ..., reserved_bytes: _Optional[int] = ..., device: _Optional[_Union[Device, _Mapping]] = ..., fingerprint: _Optional[_Union[NumericsFingerprint, _Mapping]] = ..., effective_job: _Optional[_Union[Job, _Mapping]] = ..., device_bytes: _Optional[int] = ..., credit_blocks: _Optional[int] = ..., direct: _Optional[_Union[DirectAccess, _Mapping]] = ...) -> None: ...

class Device(_message.Message):
    __slots__ = ("backend", "index", "name", "memory_bytes", "compute_capability", "memory_limit_bytes", "sums_rounded_to_nearest", "ignores_tf32")
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_CAPABILITY_FIELD_NUMBER: _ClassVar[int]
    MEMORY_LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SUMS_ROUNDED_TO_NEAREST_FIELD_NUMBER: _ClassVar[int]
    IGNORES_TF32_FIELD_NUMBER: _ClassVar[int]
    backend: str
    index: int
    name: str
    memory_bytes: int
    compute_capability: str
    memory_limit_bytes: int
    sums_rounded_to_nearest: _containers.RepeatedScalarFieldContainer[_matrix_pb2.Dtype]
    ignores_tf32: bool
    def __init__(self, backend: _Optional[str] = ..., index: _Optional[int] = ..., name: _Optional[str] = ..., memory_bytes: _Optional[int] = ..., compute_capability: _Optional[str] = ..., memory_limit_bytes: _Optional[int] = ..., sums_rounded_to_nearest: _Optional[_Iterable[_Union[_matrix_pb2.Dtype, str]]] = ..., ignores_tf32: bool = ...) -> None: ...

class NumericsFingerprint(_message.Message):
    __slots__ = ("library", "device", "threads", "block_rows", "segment_rows")
    LIBRARY_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_ROWS_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_ROWS_FIELD_NUMBER: _ClassVar[int]
    library: str
    device: str
    threads: int
    block_rows: int
    segment_rows: int
    def __init__(self, library: _Optional[str] = ..., device: _Optional[str] = ..., threads: _Optional[int] = ..., block_rows: _Optional[int] = ..., segment_rows: _Optional[int] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("job_id", "server_instance", "m", "blocks", "bytes_received", "bytes_sent", "queued_seconds", "receiving_seconds", "copy_to_device_seconds", "computing_seconds", "copy_from_device_seconds", "sending_seconds", "total_seconds", "device", "peak_memory_bytes", "transport", "applied")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    SERVER_INSTANCE_FIELD_NUMBER: _ClassVar[int]
    M_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    BYTES_SENT_FIELD_NUMBER: _ClassVar[int]
    QUEUED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    RECEIVING_SECONDS_FIELD_NUMBER: _ClassVar[int]
    COPY_TO_DEVICE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    COMPUTING_SECONDS_FIELD_NUMBER: _ClassVar[int]
    COPY_FROM_DEVICE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SENDING_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PEAK_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    server_instance: str
    m: int
    blocks: int
    bytes_received: int
    bytes_sent: int
    queued_seconds: float
    receiving_seconds: float
    copy_to_device_seconds: float
    computing_seconds: float
    copy_from_device_seconds: float
    sending_seconds: float
    total_seconds: float
    device: Device
    peak_memory_bytes: int
    transport: str
    applied: _containers.RepeatedCompositeFieldContainer[Applied]
    def __init__(self, job_id: _Optional[str] = ..., server_instance: _Optional[str] = ..., m: _Optional[int] = ..., blocks: _Optional[int] = ..., bytes_received: _Optional[int] = ..., bytes_sent: _Optional[int] = ..., queued_seconds: _Optional[float] = ..., receiving_seconds: _Optional[float] = ..., copy_to_device_seconds: _Optional[float] = ..., computing_seconds: _Optional[float] = ..., copy_from_device_seconds: _Optional[float] = ..., sending_seconds: _Optional[float] = ..., total_seconds: _Optional[float] = ..., device: _Optional[_Union[Device, _Mapping]] = ..., peak_memory_bytes: _Optional[int] = ..., transport: _Optional[str] = ..., applied: _Optional[_Iterable[_Union[Applied, _Mapping]]] = ...) -> None: ...

class Applied(_message.Message):
    __slots__ = ("tensor", "again")
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    AGAIN_FIELD_NUMBER: _ClassVar[int]
    tensor: int
    again: bool
    def __init__(self, tensor: _Optional[int] = ..., again: bool = ...) -> None: ...
