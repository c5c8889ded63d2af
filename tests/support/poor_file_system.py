"""A directory mounted as a file system that can do little: a program.

    python -m tests.support.poor_file_system SOURCE MOUNTPOINT

Hard links and files without a name are refused, fsync is not supported, and the
sizes of the file system are 0, as on exFAT, SMB shares and sshfs.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

from mfusepy import FUSE, FuseOSError, Operations


class PoorFileSystem(Operations):
    def __init__(self, source: Path) -> None:
        self._source = source

    def _at(self, path: str) -> Path:
        return self._source / path.lstrip("/")

    def getattr(self, path: str, fh: Any = None) -> dict[str, Any]:
        del fh
        found = os.lstat(self._at(path))
        return {name: getattr(found, name) for name in dir(found) if name[:3] == "st_"}

    def readdir(self, path: str, fh: Any) -> list[str]:
        del fh
        return [".", "..", *(entry.name for entry in self._at(path).iterdir())]

    def statfs(self, path: str) -> dict[str, int]:
        del path
        return {"f_bsize": 4096, "f_blocks": 0, "f_bfree": 0, "f_bavail": 0}

    def create(self, path: str, mode: int, fi: Any = None) -> int:
        del fi
        return os.open(self._at(path), os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)

    def open(self, path: str, flags: int) -> int:
        return os.open(self._at(path), flags & ~os.O_CREAT)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        del path
        return os.pread(fh, size, offset)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        del path
        return os.pwrite(fh, data, offset)

    def truncate(self, path: str, length: int, fh: int | None = None) -> None:
        del fh
        os.truncate(self._at(path), length)

    def release(self, path: str, fh: int) -> None:
        del path
        os.close(fh)

    def unlink(self, path: str) -> None:
        self._at(path).unlink()

    def rename(self, old: str, new: str) -> None:
        self._at(old).replace(self._at(new))

    def link(self, target: str, source: str) -> None:
        del target, source
        raise FuseOSError(errno.EPERM)

    def fsync(self, path: str, datasync: int, fh: int) -> None:
        del path, datasync, fh
        raise FuseOSError(errno.EINVAL)


if __name__ == "__main__":
    FUSE(
        PoorFileSystem(Path(sys.argv[1])), sys.argv[2], foreground=True, nothreads=True
    )
