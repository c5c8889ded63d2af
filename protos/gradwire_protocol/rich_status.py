"""The messages of gRPC's richer error model that gradwire uses.

They are ``google.rpc.Status``, ``ErrorInfo``, ``BadRequest`` and ``RetryInfo``, with
the fields of https://github.com/googleapis/googleapis/tree/master/google/rpc. They are
described here, in a descriptor pool of their own: a process has one default pool, and
a package with another copy of google.rpc would make the import of
googleapis-common-protos fail, and with it the import of gradwire.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import any_pb2, duration_pb2, message_factory
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool

_PACKAGE = "google.rpc"
_STRING = FieldDescriptorProto.TYPE_STRING
_FIELDS: dict[str, tuple[tuple[str, int, int | str, bool], ...]] = {
    # message: name, number, type (a message's full name), repeated
    "Status": (
        ("code", 1, FieldDescriptorProto.TYPE_INT32, False),
        ("message", 2, _STRING, False),
        ("details", 3, ".google.protobuf.Any", True),
    ),
    "ErrorInfo": (
        ("reason", 1, _STRING, False),
        ("domain", 2, _STRING, False),
        ("metadata", 3, ".google.rpc.ErrorInfo.MetadataEntry", True),
    ),
    "ErrorInfo.MetadataEntry": (
        ("key", 1, _STRING, False),
        ("value", 2, _STRING, False),
    ),
    "BadRequest": (
        ("field_violations", 1, ".google.rpc.BadRequest.FieldViolation", True),
    ),
    "BadRequest.FieldViolation": (
        ("field", 1, _STRING, False),
        ("description", 2, _STRING, False),
    ),
    "RetryInfo": (("retry_delay", 1, ".google.protobuf.Duration", False),),
}


def _classes() -> dict[str, Any]:
    file = FileDescriptorProto(
        name="gradwire/rich_status.proto", package=_PACKAGE, syntax="proto3"
    )
    pool = DescriptorPool()
    for used in any_pb2, duration_pb2:
        pool.AddSerializedFile(used.DESCRIPTOR.serialized_pb)
        file.dependency.append(used.DESCRIPTOR.name)
    messages: dict[str, Any] = {}
    for path, fields in _FIELDS.items():
        outer, _, name = path.rpartition(".")
        parent = messages[outer].nested_type if outer else file.message_type
        message = messages[path] = parent.add(name=name)
        # A map is a repeated message of this kind.
        message.options.map_entry = path == "ErrorInfo.MetadataEntry"
        for name, number, kind, repeated in fields:
            field = message.field.add(name=name, number=number)
            field.label = (
                FieldDescriptorProto.LABEL_REPEATED
                if repeated
                else FieldDescriptorProto.LABEL_OPTIONAL
            )
            if isinstance(kind, str):
                field.type, field.type_name = FieldDescriptorProto.TYPE_MESSAGE, kind
            else:
                field.type = kind
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(
            pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")
        )
        for name in ("Status", "ErrorInfo", "BadRequest", "RetryInfo")
    }


_made = _classes()
Status: Any = _made["Status"]
ErrorInfo: Any = _made["ErrorInfo"]
BadRequest: Any = _made["BadRequest"]
RetryInfo: Any = _made["RetryInfo"]
