"""Accidents that happen to a stream of messages, chosen by a seed.

Mutations of bytes alone rarely get past the first message: here whole
messages are dropped, repeated, swapped, cut and joined, and single fields of
them changed, so that what comes out is nearly right.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import google_crc32c
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from tests.thorough.fuzz.containers import Container, Ending, Method

MutateBytes: TypeAlias = Callable[[bytes, int], bytes]
"""Mutates a string of bytes, to at most so many of them."""

KindOf: TypeAlias = Callable[[Method, bytes], tuple[int, type[Message]]]
"""Where a container's message begins within its bytes, and what it is."""

NUMBERS = [0, 1, 2, 3, 4, 5, 6, 7, 63, 64, 127, 128, 255, 256, 4096, 2**20, 2**31 - 1]
NUMBERS += [2**32, 2**53, 2**62, 2**63 - 1, -1, -2, -(2**31), -(2**63)]
TEXTS = ["", "x", "é\0", "resume", "shared-memory", "y" * 200]
TEXTS += ["s1", "s2", "session-1", "exp_avg", "momentum_buffer", "saved"]
MOST_BYTES = 60_000
_INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_ENUM: (-(2**31), 2**31 - 1),
}


def mutated(
    data: bytes,
    max_size: int,
    seed: int,
    kind_of: KindOf,
    mutate_bytes: MutateBytes,
) -> bytes:
    """A container after one to three accidents.

    Args:
        data: A container.
        max_size: Most bytes that may come out.
        seed: Decides what happens.
        kind_of: What its messages are.
        mutate_bytes: Mutates bytes of which nothing is known.
    """
    rng = random.Random(seed)
    mutant = Container.unpacked(data)
    if mutant.ending is Ending.SILENCE and rng.random() < 0.95:
        mutant.ending = Ending.HALF_CLOSE  # which nobody has to wait out
    for _ in range(rng.choice((1, 1, 2, 3))):
        if rng.random() < 0.02:
            mutant.ending = rng.choice((Ending.HALF_CLOSE, Ending.CANCEL))
        if rng.random() < 0.02:
            mutant.method = rng.choice(list(Method))
        kind = partial(kind_of, mutant.method)
        _happen(mutant.messages, rng, kind, mutate_bytes)
    packed = mutant.packed()
    return packed if len(packed) <= max_size else data[:max_size]


def _happen(
    messages: list[bytes],
    rng: random.Random,
    kind_of: Callable[[bytes], tuple[int, type[Message]]],
    mutate_bytes: MutateBytes,
) -> None:
    if not messages:
        messages.append(mutate_bytes(b"", 64))
        return
    at = rng.randrange(len(messages))
    message = messages[at]
    match rng.choice(_ACCIDENTS):
        case "field":
            begin, kind = kind_of(message)
            changed_message = _with_a_field_changed(message[begin:], rng, kind)
            messages[at] = message[:begin] + changed_message
        case "bytes":
            messages[at] = mutate_bytes(message, min(len(message) + 64, MOST_BYTES))
        case "drop":
            del messages[at]
        case "repeat":
            messages.insert(rng.randrange(len(messages) + 1), message)
        case "swap":
            other = rng.randrange(len(messages))
            messages[at], messages[other] = messages[other], message
        case "cut":
            messages[at] = message[: rng.randint(0, len(message))]
        case "join" if at + 1 < len(messages):  # protobuf merges them into one
            messages[at] = (message + messages.pop(at + 1))[:MOST_BYTES]
        case "flip" if message:
            changed = bytearray(message)
            bit = rng.randrange(8 * min(len(changed), 24))
            changed[bit // 8] ^= 1 << bit % 8
            messages[at] = bytes(changed)


_ACCIDENTS = ["field"] * 5 + ["bytes"] * 2
_ACCIDENTS += ["drop", "repeat", "swap", "cut", "join", "flip"]


def _with_a_field_changed(
    data: bytes, rng: random.Random, kind: type[Message]
) -> bytes:
    message = kind()
    try:
        message.ParseFromString(data)
    except DecodeError:
        return data
    _change_a_field(message, rng)
    chunk: Any = getattr(message, "chunk", None)
    if chunk is not None and chunk.HasField("crc32c") and rng.random() < 0.7:
        chunk.crc32c = google_crc32c.value(chunk.data)  # or nothing else is reached
    return message.SerializeToString()[:MOST_BYTES]


def _change_a_field(message: Message, rng: random.Random) -> None:
    """Changes a field of a message, or of one that it holds."""
    given = [field for field, _ in message.ListFields()]
    every = list(message.DESCRIPTOR.fields)
    if not every:
        return
    # Most often what is there: a new field is one more thing that is wrong.
    field = rng.choice(given if given and rng.random() < 0.85 else every)
    if rng.random() < 0.1:
        message.ClearField(field.name)
    elif field.is_repeated:
        values = getattr(message, field.name)
        if values and rng.random() < 0.5:
            values.pop()
        elif field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
            if field.message_type.GetOptions().map_entry:
                return
            _change_a_field(values.add(), rng)
        else:
            values.append(_value(field, rng, None))
    elif field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
        inner = getattr(message, field.name)
        inner.SetInParent()
        if inner.DESCRIPTOR.fields:
            _change_a_field(inner, rng)
    else:
        before = getattr(message, field.name)
        setattr(message, field.name, _value(field, rng, before))


def _value(field: FieldDescriptor, rng: random.Random, before: Any) -> Any:
    if field.cpp_type in _INTEGERS:
        low, high = _INTEGERS[field.cpp_type]
        near = (before or 0) + rng.choice((-2, -1, 1, 2, 6, 64))
        return min(max(rng.choice((near, near, rng.choice(NUMBERS))), low), high)
    if field.type == FieldDescriptor.TYPE_BYTES:
        size = max(0, len(before or b"") + rng.choice((-8, -4, -1, 1, 2, 4, 8, 24)))
        return ((before or b"") + rng.randbytes(64))[: min(size, MOST_BYTES)]
    if field.type == FieldDescriptor.TYPE_STRING:
        text = rng.choice(TEXTS)
        return rng.choice((text, (before or "")[:-1], (before or "") + "x"))
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return not before
    return rng.choice((0.0, -1.0, 1e300, float("nan"), float("inf")))
