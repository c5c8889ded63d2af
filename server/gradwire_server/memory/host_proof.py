"""The proof that a client shares the server's host.

The peer of a call is local if a proxy on the server's host forwards it, whoever called
the proxy. So a client has to know what is in a file without a name that this process
holds open: only processes on the host may read it, of the same user or of root, in the
same process namespace. They are those that can open regions.
"""

from __future__ import annotations

import fcntl
import hmac
import os
import secrets

from gradwire_protocol.limits import PROOF_FILE
from gradwire_protocol.v1 import gradient_service_pb2 as pb2

_COOKIE_BYTES = 32
_PROOF_BYTES = 32
_SEALS = (
    fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
)


class HostProof:
    """The file of one server process. It is created when it is needed.

    The first half of its contents is told to clients, so that they can recognize the
    file. The second half is the proof.
    """

    def __init__(self) -> None:
        self._cookie = secrets.token_bytes(_COOKIE_BYTES)
        self._proof = secrets.token_bytes(_PROOF_BYTES)
        self._fd: int | None = None

    def challenge(self) -> pb2.RegionChallenge:
        """Return where the proof is.

        Raises:
            OSError: The process has no descriptors left.
        """
        if self._fd is None:
            self._fd = self._created()
        return pb2.RegionChallenge(pid=os.getpid(), fd=self._fd, cookie=self._cookie)

    def is_proven(self, proof: bytes) -> bool:
        """Return whether a client has read the file."""
        return hmac.compare_digest(proof, self._proof)

    def close(self) -> None:
        """Close the file."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _created(self) -> int:
        fd = os.memfd_create(PROOF_FILE, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.write(fd, self._cookie + self._proof)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(fd)
            raise
        return fd
