"""A frame to send on a direct connection."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from gradwire_protocol.data_plane.frames import FrameHeader


class Frame(NamedTuple):
    """A frame to send."""

    header: FrameHeader
    payload: memoryview


Message: TypeAlias = bytes | Frame
"""A message of the call, or a frame on its direct connection."""
