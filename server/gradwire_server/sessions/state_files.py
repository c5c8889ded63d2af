"""Saved states of sessions: a folder for each tenant, a file for each name."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path

from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.limits import MAX_STATE_NAME_LENGTH
from gradwire_protocol.v1 import session_service_pb2 as pb2
from gradwire_server.errors import JobError, StateDirectoryError
from gradwire_server.sessions.state_contents import SavedState, Snapshot
from gradwire_server.sessions.tensor_files import Access, TensorFileError, write

MAX_STATES = 64
"""Most saved states of a tenant."""

_MAX_CACHED = 4096
"""Files whose steps are remembered."""

_NAME = re.compile(rf"[A-Za-z0-9._-]{{1,{MAX_STATE_NAME_LENGTH}}}")
_SUFFIX = ".safetensors"
_READ_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
"""Whatever lies there, opening it ends: no link is followed, no pipe waited for."""
_MAX_FOLDER_LENGTH = 200
_PLAIN = b"abcdefghijklmnopqrstuvwxyz0123456789_-"


def check_name(name: str, path: str) -> None:
    """Check a state's name.

    Raises:
        JobError: It is not valid.
    """
    if not _NAME.fullmatch(name):
        raise JobError(
            Reason.OPTION_INVALID,
            f"{path} is {name[:80]!r}: expected 1 to {MAX_STATE_NAME_LENGTH} letters, "
            f"digits, '.', '_' or '-'",
            field=path,
        )


class StateFiles:
    """A directory of saved states. Methods do I/O, and may be called in any thread.

    Args:
        directory: The directory. It is created if missing.

    Raises:
        StateDirectoryError: It cannot be used.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise StateDirectoryError(
                f"state_dir is {directory}, which cannot be used: "
                f"{error.strerror or error}"
            ) from error

    def save(self, tenant: str, name: str, state: Snapshot, access: Access) -> int:
        """Save a state, in one piece: it is complete on the disk, or the old one stays.

        Args:
            tenant: Its owner.
            name: Its name, a valid one.
            state: The state.
            access: Reads its arrays.

        Returns:
            The size of its file.

        Raises:
            JobError: It cannot be saved.
        """
        folder = self._folder(tenant)
        target = folder / f"{name}{_SUFFIX}"
        try:
            try:
                folder.mkdir(mode=0o700)
            except FileExistsError:
                pass
            else:
                _sync_folder(self._directory)
            _check_count(folder, name)
            with _locked(folder / f".{name}.part") as (part, descriptor):
                try:
                    size = write(descriptor, state.arrays, state.metadata, access)
                    os.fsync(descriptor)
                    part.replace(target)
                except BaseException:
                    part.unlink(missing_ok=True)
                    raise
            _sync_folder(folder)
        except OSError as error:
            raise JobError(
                Reason.STATE_NOT_SAVED,
                f"the state {name!r} was not saved: {error.strerror or 'no reason'} "
                f"(an earlier one is unchanged)",
                log={"file": str(target), "cause": str(error)},
            ) from None
        return size

    def open(self, tenant: str, name: str) -> SavedState:
        """Open a state of a tenant.

        Raises:
            JobError: There is none of that name, or it cannot be used.
        """
        target = self._folder(tenant) / f"{name}{_SUFFIX}"
        try:
            descriptor = os.open(target, _READ_FLAGS)
        except FileNotFoundError:
            raise _unknown(name, "restore") from None
        except OSError as error:
            why = f"cannot be read: {error.strerror}"
            if error.errno == errno.ELOOP:  # its text tells of many levels
                why = "is a symbolic link, and none is followed"
            raise _unusable(name, target, why) from None
        fail = partial(_unusable, name, target)
        try:
            return _read(descriptor, fail)
        except BaseException:
            os.close(descriptor)
            raise

    def list(self, tenant: str) -> list[pb2.SavedState]:
        """Return a tenant's states, in the order of their names."""
        states = []
        for name, path in sorted(_states_in(self._folder(tenant)).items()):
            with contextlib.suppress(FileNotFoundError):
                about = path.lstat()
                states.append(
                    pb2.SavedState(
                        name=name,
                        step=_step_of(path, about.st_ino, about.st_mtime_ns),
                        size_bytes=about.st_size,
                        age_seconds=max(time.time() - about.st_mtime, 0.0),
                    )
                )
        return states

    def delete(self, tenant: str, name: str) -> None:
        """Delete a state of a tenant.

        Raises:
            JobError: There is none of that name, or it cannot be deleted.
        """
        folder = self._folder(tenant)
        try:
            (folder / f"{name}{_SUFFIX}").unlink()
            _sync_folder(folder)
        except FileNotFoundError:
            raise _unknown(name, "name") from None
        except OSError as error:
            raise JobError(
                Reason.STATE_INVALID,
                f"the saved state {name!r} cannot be deleted: {error.strerror}",
                field="name",
            ) from None

    def _folder(self, tenant: str) -> Path:
        """Return a tenant's folder, whose name no tenant's name can leave or share.

        Capital letters are encoded too: file systems may take them for small ones.
        """
        encoded = "".join(
            chr(byte) if byte in _PLAIN else f"%{byte:02x}"
            for byte in tenant.encode("utf-8", "surrogatepass")
        )
        name = f"tenant-{encoded}"
        if len(name) > _MAX_FOLDER_LENGTH:
            name = f"sha256-{hashlib.sha256(encoded.encode()).hexdigest()}"
        return self._directory / name


def _read(descriptor: int, fail: Callable[[str], JobError]) -> SavedState:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise fail("is not a regular file")
    try:
        return SavedState(descriptor, fail)
    except TensorFileError as error:
        raise fail(str(error)) from None
    except OSError as error:
        raise fail(f"cannot be read: {error.strerror}") from None


@lru_cache(_MAX_CACHED)
def _step_of(path: Path, inode: int, changed_ns: int) -> int | None:
    """Return the step of a saved state; None if it cannot be restored.

    Reading the description of thousands of tensors takes the interpreter 50 ms, for
    which all other calls would wait, whenever somebody lists the states again.

    Args:
        path: Its file.
        inode: The file's number: another file of that name has another one.
        changed_ns: When it was changed.
    """
    del inode, changed_ns
    try:
        descriptor = os.open(path, _READ_FLAGS)
    except OSError:
        return None
    try:
        return _read(descriptor, _damaged).step
    except JobError:
        return None
    finally:
        os.close(descriptor)


def _damaged(why: str) -> JobError:
    return JobError(Reason.STATE_INVALID, why)


def _unknown(name: str, path: str) -> JobError:
    return JobError(
        Reason.STATE_UNKNOWN,
        f"{path} is {name!r}: this server has no saved state of yours of this name",
        field=path,
    )


def _unusable(name: str, file: Path, why: str) -> JobError:
    """Return the error for a saved state that cannot be restored."""
    return JobError(
        Reason.STATE_INVALID,
        f"the saved state {name!r} {why}",
        field="restore",
        log={"file": str(file)},
    )


def _states_in(folder: Path) -> dict[str, Path]:
    """Return the files of the states in a tenant's folder, by the states' names."""
    found = {}
    with contextlib.suppress(FileNotFoundError):
        for path in folder.iterdir():
            # Not by `Path.suffix`: there is a state "..", and Pythons differ there.
            name = path.name.removesuffix(_SUFFIX)
            if name != path.name and _NAME.fullmatch(name):
                found[name] = path
    return found


def _check_count(folder: Path, name: str) -> None:
    states = _states_in(folder)
    if name not in states and len(states) >= MAX_STATES:
        raise JobError(
            Reason.STATE_NOT_SAVED,
            f"{len(states)} states of yours are saved, of at most {MAX_STATES}: save "
            f"under a name that you have used before",
        )


@contextlib.contextmanager
def _locked(part: Path) -> Iterator[tuple[Path, int]]:
    """Open an empty file for this writer alone, as long as the context lasts.

    A lock ends with its process. So what a killed server has left behind is written
    over by the next, and two sessions that save under one name wait for each other.
    """
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(part, flags, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # The writer before may have renamed the file that this one waited for.
            if _is_at(part, descriptor):
                os.ftruncate(descriptor, 0)
                yield part, descriptor
                return
        finally:
            os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot, and keep names by themselves.
        if error.errno not in {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}:
            raise
    finally:
        os.close(descriptor)
