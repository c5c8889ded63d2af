"""Paths of unix sockets, as gRPC wants them.

gRPC takes an address for a URI, and reads ``unix:/tmp/a#1`` as ``/tmp/a`` and
``unix:/tmp/a%41`` as ``/tmp/aA``. Both sides quote these signs, so that an address
means the path that it shows.
"""

from __future__ import annotations

MAX_BYTES = 107
"""Largest path in Linux's `sockaddr_un`, without the final zero byte."""

UNUSABLE = ","
"""gRPC's clients cut a path here into several addresses, quoted or not."""

_QUOTED = str.maketrans({"%": "%25", "#": "%23", "?": "%3F"})


def target(path: str) -> str:
    """Return gRPC's address of a unix socket."""
    return f"unix:{path.translate(_QUOTED)}"
