"""What is kept of a request, to recognize its repetition."""

from __future__ import annotations

import hashlib

from google.protobuf.message import Message


def digest(request: Message) -> bytes:
    """Return a digest of a request, the same for equal ones.

    The request itself may have megabytes, in fields that this version does not know,
    too, and nobody reserves memory for them.
    """
    return hashlib.sha256(request.SerializeToString(deterministic=True)).digest()
