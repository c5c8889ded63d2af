from gradwire_protocol.v1 import job_pb2 as _job_pb2
from gradwire_protocol.v1 import matrix_pb2 as _matrix_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ComputeRequest(_message.Message):
    __slots__ = ("job", "x", "w", "dy")
    JOB_FIELD_NUMBER: _ClassVar[int]
    X_FIELD_NUMBER: _ClassVar[int]
    W_FIELD_NUMBER: _ClassVar[int]
    DY_FIELD_NUMBER: _ClassVar[int]
    job: _job_pb2.Job
    x: bytes
    w: bytes
    dy: bytes
    def __init__(self, job: _Optional[_Union[_job_pb2.Job, _Mapping]] = ..., x: _Optional[bytes] = ..., w: _Optional[bytes] = ..., dy: _Optional[bytes] = ...) -> None: ...

class ComputeResponse(_message.Message):
    __slots__ = ("accepted", "y", "dx", "dw", "receipt", "db")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    Y_FIELD_NUMBER: _ClassVar[int]
    DX_FIELD_NUMBER: _ClassVar[int]
    DW_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    DB_FIELD_NUMBER: _ClassVar[int]
    accepted: _job_pb2.Accepted
    y: bytes
    dx: bytes
    dw: bytes
    receipt: _job_pb2.Receipt
    db: bytes
    def __init__(self, accepted: _Optional[_Union[_job_pb2.Accepted, _Mapping]] = ..., y: _Optional[bytes] = ..., dx: _Optional[bytes] = ..., dw: _Optional[bytes] = ..., receipt: _Optional[_Union[_job_pb2.Receipt, _Mapping]] = ..., db: _Optional[bytes] = ...) -> None: ...

class ComputeStreamRequest(_message.Message):
    __slots__ = ("job", "chunk", "end")
    JOB_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    job: _job_pb2.Job
    chunk: _matrix_pb2.Chunk
    end: _job_pb2.End
    def __init__(self, job: _Optional[_Union[_job_pb2.Job, _Mapping]] = ..., chunk: _Optional[_Union[_matrix_pb2.Chunk, _Mapping]] = ..., end: _Optional[_Union[_job_pb2.End, _Mapping]] = ...) -> None: ...

class ComputeStreamResponse(_message.Message):
    __slots__ = ("accepted", "chunk", "receipt", "queued", "checkpoint")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    accepted: _job_pb2.Accepted
    chunk: _matrix_pb2.Chunk
    receipt: _job_pb2.Receipt
    queued: _job_pb2.Queued
    checkpoint: _job_pb2.Checkpoint
    def __init__(self, accepted: _Optional[_Union[_job_pb2.Accepted, _Mapping]] = ..., chunk: _Optional[_Union[_matrix_pb2.Chunk, _Mapping]] = ..., receipt: _Optional[_Union[_job_pb2.Receipt, _Mapping]] = ..., queued: _Optional[_Union[_job_pb2.Queued, _Mapping]] = ..., checkpoint: _Optional[_Union[_job_pb2.Checkpoint, _Mapping]] = ...) -> None: ...

class OpenRegionRequest(_message.Message):
    __slots__ = ("size_bytes", "proof")
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    size_bytes: int
    proof: bytes
    def __init__(self, size_bytes: _Optional[int] = ..., proof: _Optional[bytes] = ...) -> None: ...

class RegionChallenge(_message.Message):
    __slots__ = ("pid", "fd", "cookie")
    PID_FIELD_NUMBER: _ClassVar[int]
    FD_FIELD_NUMBER: _ClassVar[int]
    COOKIE_FIELD_NUMBER: _ClassVar[int]
    pid: int
    fd: int
    cookie: bytes
    def __init__(self, pid: _Optional[int] = ..., fd: _Optional[int] = ..., cookie: _Optional[bytes] = ...) -> None: ...

class OpenRegionResponse(_message.Message):
    __slots__ = ("token", "pid", "fd", "cookie", "size_bytes", "challenge")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    FD_FIELD_NUMBER: _ClassVar[int]
    COOKIE_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHALLENGE_FIELD_NUMBER: _ClassVar[int]
    token: str
    pid: int
    fd: int
    cookie: bytes
    size_bytes: int
    challenge: RegionChallenge
    def __init__(self, token: _Optional[str] = ..., pid: _Optional[int] = ..., fd: _Optional[int] = ..., cookie: _Optional[bytes] = ..., size_bytes: _Optional[int] = ..., challenge: _Optional[_Union[RegionChallenge, _Mapping]] = ...) -> None: ...

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("version", "server_instance", "contract", "features", "devices", "backend_reason", "dtypes", "limits", "draining", "libraries", "fingerprints", "running_jobs", "queued_jobs")
    class LibrariesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SERVER_INSTANCE_FIELD_NUMBER: _ClassVar[int]
    CONTRACT_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    BACKEND_REASON_FIELD_NUMBER: _ClassVar[int]
    DTYPES_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    LIBRARIES_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINTS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_JOBS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_JOBS_FIELD_NUMBER: _ClassVar[int]
    version: str
    server_instance: str
    contract: str
    features: _containers.RepeatedScalarFieldContainer[str]
    devices: _containers.RepeatedCompositeFieldContainer[_job_pb2.Device]
    backend_reason: str
    dtypes: _containers.RepeatedScalarFieldContainer[_matrix_pb2.Dtype]
    limits: Limits
    draining: bool
    libraries: _containers.ScalarMap[str, str]
    fingerprints: _containers.RepeatedCompositeFieldContainer[_job_pb2.NumericsFingerprint]
    running_jobs: int
    queued_jobs: int
    def __init__(self, version: _Optional[str] = ..., server_instance: _Optional[str] = ..., contract: _Optional[str] = ..., features: _Optional[_Iterable[str]] = ..., devices: _Optional[_Iterable[_Union[_job_pb2.Device, _Mapping]]] = ..., backend_reason: _Optional[str] = ..., dtypes: _Optional[_Iterable[_Union[_matrix_pb2.Dtype, str]]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., draining: bool = ..., libraries: _Optional[_Mapping[str, str]] = ..., fingerprints: _Optional[_Iterable[_Union[_job_pb2.NumericsFingerprint, _Mapping]]] = ..., running_jobs: _Optional[int] = ..., queued_jobs: _Optional[int] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("memory_bytes", "max_jobs", "max_queue", "max_columns", "max_message_bytes", "idle_timeout_seconds", "early_bytes", "row_block_bytes", "max_keep_bytes", "max_sessions", "max_lease_seconds")
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_JOBS_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUE_FIELD_NUMBER: _ClassVar[int]
    MAX_COLUMNS_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    IDLE_TIMEOUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    EARLY_BYTES_FIELD_NUMBER: _ClassVar[int]
    ROW_BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_KEEP_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    memory_bytes: int
    max_jobs: int
    max_queue: int
    max_columns: int
    max_message_bytes: int
    idle_timeout_seconds: float
    early_bytes: int
    row_block_bytes: int
    max_keep_bytes: int
    max_sessions: int
    max_lease_seconds: float
    def __init__(self, memory_bytes: _Optional[int] = ..., max_jobs: _Optional[int] = ..., max_queue: _Optional[int] = ..., max_columns: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., idle_timeout_seconds: _Optional[float] = ..., early_bytes: _Optional[int] = ..., row_block_bytes: _Optional[int] = ..., max_keep_bytes: _Optional[int] = ..., max_sessions: _Optional[int] = ..., max_lease_seconds: _Optional[float] = ...) -> None: ...
