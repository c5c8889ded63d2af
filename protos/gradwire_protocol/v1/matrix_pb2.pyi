from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Matrix(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MATRIX_UNSPECIFIED: _ClassVar[Matrix]
    MATRIX_X: _ClassVar[Matrix]
    MATRIX_W: _ClassVar[Matrix]
    MATRIX_DY: _ClassVar[Matrix]
    MATRIX_Y: _ClassVar[Matrix]
    MATRIX_DX: _ClassVar[Matrix]
    MATRIX_DW: _ClassVar[Matrix]
    MATRIX_DW_SUM: _ClassVar[Matrix]
    MATRIX_DB: _ClassVar[Matrix]
    MATRIX_DB_SUM: _ClassVar[Matrix]

class Dtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[Dtype]
    DTYPE_FLOAT16: _ClassVar[Dtype]
    DTYPE_BFLOAT16: _ClassVar[Dtype]
    DTYPE_FLOAT32: _ClassVar[Dtype]
    DTYPE_FLOAT64: _ClassVar[Dtype]

class Checksum(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CHECKSUM_UNSPECIFIED: _ClassVar[Checksum]
    CHECKSUM_CRC32C: _ClassVar[Checksum]
MATRIX_UNSPECIFIED: Matrix
MATRIX_X: Matrix
MATRIX_W: Matrix
MATRIX_DY: Matrix
MATRIX_Y: Matrix
MATRIX_DX: Matrix
MATRIX_DW: Matrix
MATRIX_DW_SUM: Matrix
MATRIX_DB: Matrix
MATRIX_DB_SUM: Matrix
DTYPE_UNSPECIFIED: Dtype
DTYPE_FLOAT16: Dtype
DTYPE_BFLOAT16: Dtype
DTYPE_FLOAT32: Dtype
DTYPE_FLOAT64: Dtype
CHECKSUM_UNSPECIFIED: Checksum
CHECKSUM_CRC32C: Checksum

class Chunk(_message.Message):
    __slots__ = ("matrix", "index", "crc32c", "data")
    MATRIX_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    matrix: Matrix
    index: int
    crc32c: int
    data: bytes
    def __init__(self, matrix: _Optional[_Union[Matrix, str]] = ..., index: _Optional[int] = ..., crc32c: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...
