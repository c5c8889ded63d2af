"""Classes of protobuf messages, made at run time.

The classes equal protoc's for the same description. The bench needs neither the
compiler nor its output.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_Field = descriptor_pb2.FieldDescriptorProto
_KINDS = {
    "bytes": _Field.TYPE_BYTES,
    "int64": _Field.TYPE_INT64,
    "string": _Field.TYPE_STRING,
}


def message_classes(
    package: str, messages: Mapping[str, Mapping[str, tuple[str, int]]]
) -> list[type[Any]]:
    """Make a class for each message.

    Args:
        package: Package of the messages; may be defined only once per process.
        messages: Fields of each message: name, type and number. The type is a
            protobuf type or the name of an earlier message, with ``repeated``
            before it for repeated fields.
    """
    file = descriptor_pb2.FileDescriptorProto(
        name=f"{package}.proto", package=package, syntax="proto3"
    )
    for name, fields in messages.items():
        message = file.message_type.add(name=name)
        for field, (description, number) in fields.items():
            *repeated, kind = description.split()
            label = _Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL
            added = message.field.add(name=field, number=number, label=label)
            if kind in _KINDS:
                added.type = _KINDS[kind]
            else:
                added.type = _Field.TYPE_MESSAGE
                added.type_name = f".{package}.{kind}"
    descriptor_pool.Default().Add(file)
    found = descriptor_pool.Default().FindFileByName(file.name)
    return [
        message_factory.GetMessageClass(found.message_types_by_name[name])
        for name in messages
    ]
