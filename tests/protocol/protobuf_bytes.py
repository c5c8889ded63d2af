"""Strategies for a stream's messages in the many forms that protobuf allows.

Protobuf fixes what bytes mean, not how a value is written: fields come in any
order, may be repeated, split, unknown, and varints may be longer than needed.
"""

from hypothesis import strategies as st

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5


def varint(value: int, padding: int = 0) -> bytes:
    """A varint of `value` modulo 2**64, `padding` bytes longer than needed."""
    value %= 2**64
    groups = bytearray()
    while True:
        groups.append(value & 0x7F)
        value >>= 7
        if not value:
            break
    groups += bytes(padding)
    return bytes(group | 0x80 for group in groups[:-1]) + bytes(groups[-1:])


paddings = st.sampled_from([0] * 40 + [1, 2, 3, 9])
int64s = st.one_of(
    st.integers(-3, 300),
    st.integers(-(2**63), 2**64 - 1),
    st.sampled_from([2**31, 2**32, 2**62, 2**63 - 1, 2**63]),
)


@st.composite
def field(draw, number, wire_type, values):
    """One field: its tag, and its value in any length of varint."""
    written = varint(number << 3 | wire_type, draw(paddings))
    value = draw(values)
    if wire_type == VARINT:
        return written + varint(value, draw(paddings))
    if wire_type == LENGTH:
        excess = draw(st.sampled_from([0] * 60 + [-1, 1, 2**31, 2**63 - 1]))
        size = max(0, len(value) + excess)
        return written + varint(size, draw(paddings)) + value
    return written + value


unknown_fields = st.one_of(
    field(4, VARINT, int64s),
    field(9, LENGTH, st.binary(max_size=5)),
    field(11, FIXED64, st.binary(min_size=8, max_size=8)),
    field(14, FIXED32, st.binary(min_size=4, max_size=4)),
    # Known numbers with the wrong wire type are unknown fields too.
    field(15, VARINT, int64s),
    field(3, VARINT, int64s),
)
matrices = field(1, VARINT, st.integers(-1, 8) | int64s)
indexes = field(2, VARINT, int64s)
crc32cs = field(3, FIXED32, st.binary(min_size=4, max_size=4))
payloads = field(15, LENGTH, st.binary(max_size=20))


@st.composite
def chunks(draw):
    """The bytes of a Chunk, most often close to the canonical ones."""
    if draw(st.booleans()):
        parts = [draw(matrices)]
        parts += draw(st.lists(indexes, max_size=1))
        parts += draw(st.lists(crc32cs, max_size=1))
        parts.append(draw(payloads))
    else:
        any_field = st.one_of(matrices, indexes, crc32cs, payloads, unknown_fields)
        parts = draw(st.lists(any_field, max_size=6))
    return b"".join(parts)


@st.composite
def messages(draw):
    """The bytes of an envelope, most often with one chunk in it."""
    members = [field(2, LENGTH, chunks())]
    if draw(st.sampled_from([False, False, True])):
        others = st.one_of(
            *(
                field(number, LENGTH, st.sampled_from([b"", b"\x08\x03"]))
                for number in (1, 3, 4)
            ),
            field(2, VARINT, int64s),
            unknown_fields,
        )
        members += draw(
            st.lists(st.just(others) | st.just(members[0]), min_size=1, max_size=3)
        )
        members = draw(st.permutations(members))
    return b"".join(draw(member) for member in members)


@st.composite
def mutated(draw, originals):
    """A message after a few accidents."""
    message = bytearray(draw(originals))
    for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
        at = draw(st.integers(0, len(message)))
        byte = draw(st.integers(0, 255))
        match draw(st.sampled_from(["change"] * 6 + ["insert", "delete", "cut"])):
            case "change" if at < len(message):
                message[at] = byte
            case "insert":
                message.insert(at, byte)
            case "delete":
                del message[at : at + 1]
            case "cut":
                del message[at:]
    return bytes(message)
