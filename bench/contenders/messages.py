"""Classes of protobuf messages, made at run time.

They are those that protoc would make of the same description, without a
compiler and its output in the bench.
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
    """A class of each message.

    Args:
        package: Of the messages; it may be described once in a process.
        messages: Fields of each message: their name, and their type (one of
            protobuf's, ``repeated`` before it where it is, or the name of an
            earlier message) and number.
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
