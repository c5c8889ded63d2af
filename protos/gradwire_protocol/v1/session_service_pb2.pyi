from gradwire_protocol.v1 import job_pb2 as _job_pb2
from gradwire_protocol.v1 import matrix_pb2 as _matrix_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TensorRole(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TENSOR_ROLE_UNSPECIFIED: _ClassVar[TensorRole]
    TENSOR_ROLE_WEIGHT: _ClassVar[TensorRole]
    TENSOR_ROLE_GRADIENT: _ClassVar[TensorRole]
    TENSOR_ROLE_ACTIVATION: _ClassVar[TensorRole]
TENSOR_ROLE_UNSPECIFIED: TensorRole
TENSOR_ROLE_WEIGHT: TensorRole
TENSOR_ROLE_GRADIENT: TensorRole
TENSOR_ROLE_ACTIVATION: TensorRole

class OpenSessionRequest(_message.Message):
    __slots__ = ("label", "lease_seconds", "keep_bytes", "required_features", "restore", "save_every_steps", "save_name", "idempotency_key")
    LABEL_FIELD_NUMBER: _ClassVar[int]
    LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    KEEP_BYTES_FIELD_NUMBER: _ClassVar[int]
    REQUIRED_FEATURES_FIELD_NUMBER: _ClassVar[int]
    RESTORE_FIELD_NUMBER: _ClassVar[int]
    SAVE_EVERY_STEPS_FIELD_NUMBER: _ClassVar[int]
    SAVE_NAME_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    label: str
    lease_seconds: float
    keep_bytes: int
    required_features: _containers.RepeatedScalarFieldContainer[str]
    restore: str
    save_every_steps: int
    save_name: str
    idempotency_key: bytes
    def __init__(self, label: _Optional[str] = ..., lease_seconds: _Optional[float] = ..., keep_bytes: _Optional[int] = ..., required_features: _Optional[_Iterable[str]] = ..., restore: _Optional[str] = ..., save_every_steps: _Optional[int] = ..., save_name: _Optional[str] = ..., idempotency_key: _Optional[bytes] = ...) -> None: ...

class OpenSessionResponse(_message.Message):
    __slots__ = ("session", "server_instance", "device", "lease_seconds", "id", "step")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    SERVER_INSTANCE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    session: str
    server_instance: str
    device: _job_pb2.Device
    lease_seconds: float
    id: str
    step: int
    def __init__(self, session: _Optional[str] = ..., server_instance: _Optional[str] = ..., device: _Optional[_Union[_job_pb2.Device, _Mapping]] = ..., lease_seconds: _Optional[float] = ..., id: _Optional[str] = ..., step: _Optional[int] = ...) -> None: ...

class RenewSessionRequest(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: str
    def __init__(self, session: _Optional[str] = ...) -> None: ...

class RenewSessionResponse(_message.Message):
    __slots__ = ("lease_seconds", "step")
    LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    lease_seconds: float
    step: int
    def __init__(self, lease_seconds: _Optional[float] = ..., step: _Optional[int] = ...) -> None: ...

class CloseSessionRequest(_message.Message):
    __slots__ = ("session", "id")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    session: str
    id: str
    def __init__(self, session: _Optional[str] = ..., id: _Optional[str] = ...) -> None: ...

class CloseSessionResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListSessionsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListSessionsResponse(_message.Message):
    __slots__ = ("sessions",)
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    sessions: _containers.RepeatedCompositeFieldContainer[SessionSummary]
    def __init__(self, sessions: _Optional[_Iterable[_Union[SessionSummary, _Mapping]]] = ...) -> None: ...

class SessionSummary(_message.Message):
    __slots__ = ("id", "label", "device", "step", "tensors", "keep_bytes", "used_bytes", "lease_seconds", "idle_seconds", "age_seconds")
    ID_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    KEEP_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    IDLE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    AGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    id: str
    label: str
    device: int
    step: int
    tensors: int
    keep_bytes: int
    used_bytes: int
    lease_seconds: float
    idle_seconds: float
    age_seconds: float
    def __init__(self, id: _Optional[str] = ..., label: _Optional[str] = ..., device: _Optional[int] = ..., step: _Optional[int] = ..., tensors: _Optional[int] = ..., keep_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., lease_seconds: _Optional[float] = ..., idle_seconds: _Optional[float] = ..., age_seconds: _Optional[float] = ...) -> None: ...

class DescribeSessionRequest(_message.Message):
    __slots__ = ("session", "id")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    session: str
    id: str
    def __init__(self, session: _Optional[str] = ..., id: _Optional[str] = ...) -> None: ...

class DescribeSessionResponse(_message.Message):
    __slots__ = ("label", "server_instance", "device", "lease_seconds", "step", "keep_bytes", "used_bytes", "tensors")
    LABEL_FIELD_NUMBER: _ClassVar[int]
    SERVER_INSTANCE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    KEEP_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    label: str
    server_instance: str
    device: _job_pb2.Device
    lease_seconds: float
    step: int
    keep_bytes: int
    used_bytes: int
    tensors: _containers.RepeatedCompositeFieldContainer[TensorInfo]
    def __init__(self, label: _Optional[str] = ..., server_instance: _Optional[str] = ..., device: _Optional[_Union[_job_pb2.Device, _Mapping]] = ..., lease_seconds: _Optional[float] = ..., step: _Optional[int] = ..., keep_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[TensorInfo, _Mapping]]] = ...) -> None: ...

class TensorInfo(_message.Message):
    __slots__ = ("header", "size_bytes", "states", "updates", "parts", "sharers")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    SHARERS_FIELD_NUMBER: _ClassVar[int]
    header: TensorHeader
    size_bytes: int
    states: _containers.RepeatedScalarFieldContainer[str]
    updates: int
    parts: _containers.RepeatedScalarFieldContainer[int]
    sharers: int
    def __init__(self, header: _Optional[_Union[TensorHeader, _Mapping]] = ..., size_bytes: _Optional[int] = ..., states: _Optional[_Iterable[str]] = ..., updates: _Optional[int] = ..., parts: _Optional[_Iterable[int]] = ..., sharers: _Optional[int] = ...) -> None: ...

class TensorHeader(_message.Message):
    __slots__ = ("session", "tensor", "name", "shape", "dtype", "role", "compute_dtype", "checksum", "zeros", "state", "updates", "idempotency_key", "keep_states", "frozen", "sha256")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    ZEROS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    KEEP_STATES_FIELD_NUMBER: _ClassVar[int]
    FROZEN_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    session: str
    tensor: int
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    dtype: _matrix_pb2.Dtype
    role: TensorRole
    compute_dtype: _matrix_pb2.Dtype
    checksum: _matrix_pb2.Checksum
    zeros: bool
    state: str
    updates: int
    idempotency_key: bytes
    keep_states: bool
    frozen: bool
    sha256: bytes
    def __init__(self, session: _Optional[str] = ..., tensor: _Optional[int] = ..., name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., dtype: _Optional[_Union[_matrix_pb2.Dtype, str]] = ..., role: _Optional[_Union[TensorRole, str]] = ..., compute_dtype: _Optional[_Union[_matrix_pb2.Dtype, str]] = ..., checksum: _Optional[_Union[_matrix_pb2.Checksum, str]] = ..., zeros: bool = ..., state: _Optional[str] = ..., updates: _Optional[int] = ..., idempotency_key: _Optional[bytes] = ..., keep_states: bool = ..., frozen: bool = ..., sha256: _Optional[bytes] = ...) -> None: ...

class TensorChunk(_message.Message):
    __slots__ = ("index", "crc32c", "data")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    index: int
    crc32c: int
    data: bytes
    def __init__(self, index: _Optional[int] = ..., crc32c: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class PutTensorRequest(_message.Message):
    __slots__ = ("header", "chunk", "direct")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    DIRECT_FIELD_NUMBER: _ClassVar[int]
    header: TensorHeader
    chunk: TensorChunk
    direct: _job_pb2.DirectOffer
    def __init__(self, header: _Optional[_Union[TensorHeader, _Mapping]] = ..., chunk: _Optional[_Union[TensorChunk, _Mapping]] = ..., direct: _Optional[_Union[_job_pb2.DirectOffer, _Mapping]] = ...) -> None: ...

class PutTensorResponse(_message.Message):
    __slots__ = ("used_bytes", "accepted", "direct")
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    DIRECT_FIELD_NUMBER: _ClassVar[int]
    used_bytes: int
    accepted: bool
    direct: _job_pb2.DirectAccess
    def __init__(self, used_bytes: _Optional[int] = ..., accepted: bool = ..., direct: _Optional[_Union[_job_pb2.DirectAccess, _Mapping]] = ...) -> None: ...

class GetTensorRequest(_message.Message):
    __slots__ = ("session", "tensor", "state", "checksum", "max_chunk_bytes", "direct")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    MAX_CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    DIRECT_FIELD_NUMBER: _ClassVar[int]
    session: str
    tensor: int
    state: str
    checksum: _matrix_pb2.Checksum
    max_chunk_bytes: int
    direct: _job_pb2.DirectOffer
    def __init__(self, session: _Optional[str] = ..., tensor: _Optional[int] = ..., state: _Optional[str] = ..., checksum: _Optional[_Union[_matrix_pb2.Checksum, str]] = ..., max_chunk_bytes: _Optional[int] = ..., direct: _Optional[_Union[_job_pb2.DirectOffer, _Mapping]] = ...) -> None: ...

class GetTensorResponse(_message.Message):
    __slots__ = ("header", "chunk", "direct")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    DIRECT_FIELD_NUMBER: _ClassVar[int]
    header: TensorHeader
    chunk: TensorChunk
    direct: _job_pb2.DirectAccess
    def __init__(self, header: _Optional[_Union[TensorHeader, _Mapping]] = ..., chunk: _Optional[_Union[TensorChunk, _Mapping]] = ..., direct: _Optional[_Union[_job_pb2.DirectAccess, _Mapping]] = ...) -> None: ...

class DropTensorsRequest(_message.Message):
    __slots__ = ("session", "tensors")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    session: str
    tensors: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, session: _Optional[str] = ..., tensors: _Optional[_Iterable[int]] = ...) -> None: ...

class DropTensorsResponse(_message.Message):
    __slots__ = ("used_bytes",)
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    used_bytes: int
    def __init__(self, used_bytes: _Optional[int] = ...) -> None: ...

class StepRequest(_message.Message):
    __slots__ = ("session", "step", "groups", "max_norm", "local_sum_of_squares", "inverse_scale", "skip_nonfinite", "keep_gradients")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    MAX_NORM_FIELD_NUMBER: _ClassVar[int]
    LOCAL_SUM_OF_SQUARES_FIELD_NUMBER: _ClassVar[int]
    INVERSE_SCALE_FIELD_NUMBER: _ClassVar[int]
    SKIP_NONFINITE_FIELD_NUMBER: _ClassVar[int]
    KEEP_GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    session: str
    step: int
    groups: _containers.RepeatedCompositeFieldContainer[ParameterGroup]
    max_norm: float
    local_sum_of_squares: float
    inverse_scale: float
    skip_nonfinite: bool
    keep_gradients: bool
    def __init__(self, session: _Optional[str] = ..., step: _Optional[int] = ..., groups: _Optional[_Iterable[_Union[ParameterGroup, _Mapping]]] = ..., max_norm: _Optional[float] = ..., local_sum_of_squares: _Optional[float] = ..., inverse_scale: _Optional[float] = ..., skip_nonfinite: bool = ..., keep_gradients: bool = ...) -> None: ...

class ParameterGroup(_message.Message):
    __slots__ = ("parameters", "sgd", "adam")
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    SGD_FIELD_NUMBER: _ClassVar[int]
    ADAM_FIELD_NUMBER: _ClassVar[int]
    parameters: _containers.RepeatedCompositeFieldContainer[Parameter]
    sgd: Sgd
    adam: Adam
    def __init__(self, parameters: _Optional[_Iterable[_Union[Parameter, _Mapping]]] = ..., sgd: _Optional[_Union[Sgd, _Mapping]] = ..., adam: _Optional[_Union[Adam, _Mapping]] = ...) -> None: ...

class Parameter(_message.Message):
    __slots__ = ("weight", "gradient")
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_FIELD_NUMBER: _ClassVar[int]
    weight: int
    gradient: int
    def __init__(self, weight: _Optional[int] = ..., gradient: _Optional[int] = ...) -> None: ...

class Sgd(_message.Message):
    __slots__ = ("lr", "momentum", "dampening", "weight_decay", "nesterov")
    LR_FIELD_NUMBER: _ClassVar[int]
    MOMENTUM_FIELD_NUMBER: _ClassVar[int]
    DAMPENING_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    NESTEROV_FIELD_NUMBER: _ClassVar[int]
    lr: float
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    def __init__(self, lr: _Optional[float] = ..., momentum: _Optional[float] = ..., dampening: _Optional[float] = ..., weight_decay: _Optional[float] = ..., nesterov: bool = ...) -> None: ...

class Adam(_message.Message):
    __slots__ = ("lr", "beta1", "beta2", "eps", "weight_decay", "decoupled")
    LR_FIELD_NUMBER: _ClassVar[int]
    BETA1_FIELD_NUMBER: _ClassVar[int]
    BETA2_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    DECOUPLED_FIELD_NUMBER: _ClassVar[int]
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool
    def __init__(self, lr: _Optional[float] = ..., beta1: _Optional[float] = ..., beta2: _Optional[float] = ..., eps: _Optional[float] = ..., weight_decay: _Optional[float] = ..., decoupled: bool = ...) -> None: ...

class StepResponse(_message.Message):
    __slots__ = ("step", "total_norm", "skipped", "again")
    STEP_FIELD_NUMBER: _ClassVar[int]
    TOTAL_NORM_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    AGAIN_FIELD_NUMBER: _ClassVar[int]
    step: int
    total_norm: float
    skipped: bool
    again: bool
    def __init__(self, step: _Optional[int] = ..., total_norm: _Optional[float] = ..., skipped: bool = ..., again: bool = ...) -> None: ...

class SaveSessionRequest(_message.Message):
    __slots__ = ("session", "name", "id")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    session: str
    name: str
    id: str
    def __init__(self, session: _Optional[str] = ..., name: _Optional[str] = ..., id: _Optional[str] = ...) -> None: ...

class SaveSessionResponse(_message.Message):
    __slots__ = ("step", "size_bytes")
    STEP_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    step: int
    size_bytes: int
    def __init__(self, step: _Optional[int] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class ListSavedStatesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListSavedStatesResponse(_message.Message):
    __slots__ = ("states",)
    STATES_FIELD_NUMBER: _ClassVar[int]
    states: _containers.RepeatedCompositeFieldContainer[SavedState]
    def __init__(self, states: _Optional[_Iterable[_Union[SavedState, _Mapping]]] = ...) -> None: ...

class SavedState(_message.Message):
    __slots__ = ("name", "step", "size_bytes", "age_seconds")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    AGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    name: str
    step: int
    size_bytes: int
    age_seconds: float
    def __init__(self, name: _Optional[str] = ..., step: _Optional[int] = ..., size_bytes: _Optional[int] = ..., age_seconds: _Optional[float] = ...) -> None: ...

class DeleteSavedStateRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class DeleteSavedStateResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
