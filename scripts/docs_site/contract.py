"""The reference of the contract, from the comments in protos/gradwire."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
    ServiceDescriptorProto,
)

ROOT = Path(__file__).resolve().parents[2]

# Numbers of fields in descriptor.proto, of which paths of comments consist.
_SYNTAX = FileDescriptorProto.SYNTAX_FIELD_NUMBER
_MESSAGES = FileDescriptorProto.MESSAGE_TYPE_FIELD_NUMBER
_ENUMS = FileDescriptorProto.ENUM_TYPE_FIELD_NUMBER
_SERVICES = FileDescriptorProto.SERVICE_FIELD_NUMBER
_METHODS = ServiceDescriptorProto.METHOD_FIELD_NUMBER
_FIELDS = DescriptorProto.FIELD_FIELD_NUMBER
_ONEOFS = DescriptorProto.ONEOF_DECL_FIELD_NUMBER
_NESTED = DescriptorProto.NESTED_TYPE_FIELD_NUMBER
_NESTED_ENUMS = DescriptorProto.ENUM_TYPE_FIELD_NUMBER
_VALUES = EnumDescriptorProto.VALUE_FIELD_NUMBER

Path_ = tuple[int, ...]


def markdown() -> str:
    """A section for each file: its services, then its messages and enums."""
    files = [file for file in _described() if file.package.startswith("gradwire.")]
    # Services first: they say what the messages are for.
    files.sort(key=lambda file: (not file.service, file.name))
    anchors = {name: name for file in files for name in _names(file)}
    for name in list(anchors):
        # Comments name methods without their service.
        anchors.setdefault(name.rpartition(".")[2], name)
    return "\n\n".join(text for file in files for text in _Page(file, anchors).parts())


def _described() -> Sequence[FileDescriptorProto]:
    # buf is installed beside Python, whether or not that environment is active.
    beside = Path(sys.executable).parent / "buf"
    buf = str(beside) if beside.exists() else shutil.which("buf")
    if buf is None:
        raise RuntimeError("buf, which reads the contract, is not installed")
    done = subprocess.run(
        [buf, "build", "--output", "-#format=binpb"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    return FileDescriptorSet.FromString(done.stdout).file


def _names(file: FileDescriptorProto) -> Iterator[str]:
    """Names with an anchor of their own."""
    for service in file.service:
        yield service.name
        yield from (f"{service.name}.{method.name}" for method in service.method)
    for message in file.message_type:
        yield from _nested_names(message, "")
    yield from (enum.name for enum in file.enum_type)


def _nested_names(message: DescriptorProto, scope: str) -> Iterator[str]:
    yield f"{scope}{message.name}"
    for nested in message.nested_type:
        yield from _nested_names(nested, f"{scope}{message.name}.")
    yield from (f"{scope}{message.name}.{enum.name}" for enum in message.enum_type)


class _Page:
    """The sections of one file."""

    def __init__(self, file: FileDescriptorProto, anchors: dict[str, str]) -> None:
        self._file = file
        self._anchors = anchors
        self._comments = {
            tuple(location.path): location.leading_comments
            for location in file.source_code_info.location
        }
        self._about = "".join(
            comment
            for location in file.source_code_info.location
            if tuple(location.path) == (_SYNTAX,)
            for comment in location.leading_detached_comments
        )

    def parts(self) -> Iterator[str]:
        file = self._file
        yield f"## {Path(file.name).name}"
        yield self._text(self._about, None)
        for i, service in enumerate(file.service):
            yield from self._service(service, (_SERVICES, i))
        for i, message in enumerate(file.message_type):
            yield from self._message(message, (_MESSAGES, i), "")
        for i, enum in enumerate(file.enum_type):
            yield from self._enum(enum, (_ENUMS, i), "")

    def _service(self, service: ServiceDescriptorProto, at: Path_) -> Iterator[str]:
        yield f"### service {service.name} {{ #{service.name} }}"
        yield self._comment(at, service.name)
        for i, method in enumerate(service.method):
            name = f"{service.name}.{method.name}"
            yield f"#### {method.name} {{ #{name} }}"
            yield self._signature(method)
            yield self._comment((*at, _METHODS, i), name)

    def _signature(self, method: MethodDescriptorProto) -> str:
        sent = self._type(method.input_type, repeated=method.client_streaming)
        returned = self._type(method.output_type, repeated=method.server_streaming)
        return f"{sent} → {returned}"

    def _type(self, name: str, *, repeated: bool) -> str:
        return f"{'stream of ' if repeated else ''}{self._link(_short(name))}"

    def _message(
        self, message: DescriptorProto, at: Path_, scope: str
    ) -> Iterator[str]:
        name = f"{scope}{message.name}"
        yield f"### {name} {{ #{name} }}"
        yield self._comment(at, name)
        oneofs: set[int] = set()
        for i, field in enumerate(message.field):
            if field.HasField("oneof_index") and not field.proto3_optional:
                if field.oneof_index not in oneofs:
                    oneofs.add(field.oneof_index)
                    oneof = message.oneof_decl[field.oneof_index].name
                    where = (*at, _ONEOFS, field.oneof_index)
                    yield f"**oneof** `{oneof}`: {self._comment(where, name)}"
            else:
                oneofs.clear()
            kind = self._field_type(field, message)
            about = self._comment((*at, _FIELDS, i), name)
            yield _definition(f"`{field.name}` = {field.number}, {kind}", about)
        for i, nested in enumerate(message.nested_type):
            if not nested.options.map_entry:
                yield from self._message(nested, (*at, _NESTED, i), f"{name}.")
        for i, enum in enumerate(message.enum_type):
            yield from self._enum(enum, (*at, _NESTED_ENUMS, i), f"{name}.")

    def _field_type(self, field: FieldDescriptorProto, within: DescriptorProto) -> str:
        if field.label == field.LABEL_REPEATED:
            for nested in within.nested_type:
                if nested.options.map_entry and field.type_name.endswith(
                    f".{within.name}.{nested.name}"
                ):
                    key, value = (self._one_type(each) for each in nested.field)
                    return f"map of {key} to {value}"
            return f"repeated {self._one_type(field)}"
        optional = "optional " if field.proto3_optional else ""
        return f"{optional}{self._one_type(field)}"

    def _one_type(self, field: FieldDescriptorProto) -> str:
        if field.type_name:
            return self._link(_short(field.type_name))
        return FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()

    def _enum(self, enum: EnumDescriptorProto, at: Path_, scope: str) -> Iterator[str]:
        name = f"{scope}{enum.name}"
        yield f"### enum {name} {{ #{name} }}"
        yield self._comment(at, name)
        for i, value in enumerate(enum.value):
            about = self._comment((*at, _VALUES, i), name)
            yield _definition(f"`{value.name}` = {value.number}", about)

    def _comment(self, at: Path_, within: str | None) -> str:
        return self._text(self._comments.get(at, ""), within)

    def _text(self, comment: str, within: str | None) -> str:
        paragraphs = re.split(r"\n\s*\n", textwrap.dedent(comment).strip("\n"))
        return "\n\n".join(self._paragraph(each, within) for each in paragraphs)

    def _paragraph(self, text: str, within: str | None) -> str:
        if re.fullmatch(r"(  .*\n?)+", text):
            return f"```text\n{textwrap.dedent(text)}\n```"
        text = re.sub(r"([*<\[\\])", r"\\\1", text)
        return re.sub(
            r"(?<![\w.`])[A-Z]\w*(?:\.\w+)*",
            lambda match: self._named(match[0], within),
            text,
        )

    def _named(self, word: str, within: str | None) -> str:
        """A word of a comment, as a link if it names something else."""
        name = word if word in self._anchors else word.partition(".")[0]
        anchor = self._anchors.get(name)
        return word if anchor in {None, within} else f"[{word}](#{anchor})"

    def _link(self, name: str) -> str:
        return f"[{name}](#{name})" if name in self._anchors else name


def _short(name: str) -> str:
    """A type's name without the package of the contract."""
    return re.sub(r"^\.gradwire\.v\d+\.", "", name).removeprefix(".")


def _definition(term: str, about: str) -> str:
    body = textwrap.indent(about, "    ").lstrip()
    return f"{term}\n:   {body}" if body else term
