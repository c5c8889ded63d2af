"""Results streamed into ``.npy`` files, which appear all together or not at all.

Each file is written without a name (``O_TMPFILE``), or under a hidden name if the
file system does not support that. It gets its own name when all results are
complete and on disk. What the directory's file system can do is tried before
anything is computed: exFAT, SMB and sshfs have no hard links, and some have no fsync.

Finished results are never thrown away: if one cannot get its name, all stay in the
directory under other names.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gradwire_cli.errors import CommandError
from gradwire_cli.terminal.units import format_bytes
from gradwire_protocol.dtypes import Dtype


class ResultSpec(NamedTuple):
    """Shape and dtype of a result in its file."""

    shape: tuple[int, ...]
    dtype: Dtype

    @property
    def size_bytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize


class ResultFiles:
    """The files ``DIR/y.npy``, ``DIR/dx.npy`` and so on of one job.

    A context manager: leaving it without `commit` leaves the directory
    unchanged. bfloat16 is written like NumPy writes it, as raw 2-byte elements.
    NumPy reads them back as ``|V2``, and ``.view(ml_dtypes.bfloat16)`` restores
    the numbers.
    """

    def __init__(
        self,
        directory: Path,
        specs: Mapping[str, ResultSpec],
        *,
        replace: bool,
        keep: Iterable[Path] = (),
    ) -> None:
        """Prepare the files without making them visible.

        Args:
            directory: Output directory; created if missing.
            specs: The results, by file name without ``.npy``.
            replace: Whether existing files may be replaced.
            keep: Files that must never be replaced: the operands.

        Raises:
            CommandError: The directory cannot be written, a file exists, or disk
                space is insufficient.
        """
        self._directory = directory
        self._replace = replace
        self._files: dict[str, _PendingFile] = {}
        self._made = self._make_directory()
        try:
            self._refuse_operands(specs, keep)
            self._refuse_existing(specs)
            self._refuse_too_large(specs)
            abilities = _try(directory)
            for name, spec in specs.items():
                self._files[name] = _PendingFile(self._target(name), spec, abilities)
        except BaseException:
            self._discard()
            raise

    def __enter__(self) -> ResultFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._discard()

    def append(self, name: str, rows: npt.NDArray[Any]) -> None:
        """Write the next rows of a result.

        Raises:
            CommandError: The disk is full or fails.
        """
        self._files[name].append(rows)

    def commit(self) -> tuple[Path, ...]:
        """Give the files their names, and return the paths.

        Raises:
            CommandError: The disk is full or fails, or a file of that name was
                created meanwhile. Unless the disk is full, the results are complete,
                and the message has their paths.
        """
        try:
            for file in self._files.values():
                file.flush()
            for file in self._files.values():
                file.publish(replace=self._replace)
        except _DiskFullError:
            raise
        except CommandError as error:
            kept = [file.set_aside() for file in self._files.values()]
            paths = ", ".join(str(path) for path in kept if path is not None)
            self._made = []
            raise CommandError(
                f"{error}; the complete results are in {paths}"
            ) from error
        except BaseException:
            if not self._replace:
                for file in self._files.values():
                    if file.has_appeared:
                        file.target.unlink(missing_ok=True)
            raise
        self._made = []
        return tuple(file.target for file in self._files.values())

    def _target(self, name: str) -> Path:
        return self._directory / f"{name}.npy"

    def _make_directory(self) -> list[Path]:
        """Create the directory; return the created ones, outermost last."""
        missing = [
            path
            for path in (self._directory, *self._directory.parents)
            if not os.path.lexists(path)
        ]
        try:
            self._directory.mkdir(parents=True)
        except FileExistsError:
            if not self._directory.is_dir():
                raise CommandError(
                    f"{self._directory} exists and is not a directory"
                ) from None
            return []
        except OSError as error:
            raise _cannot_write(self._directory, error) from error
        return missing

    def _refuse_operands(self, names: Iterable[str], keep: Iterable[Path]) -> None:
        kept = list(keep)
        for target in map(self._target, names):
            if target.exists() and any(
                path.exists() and target.samefile(path) for path in kept
            ):
                raise CommandError(
                    f"{target} is an operand, and a result would replace it: choose "
                    "another directory with --out"
                )

    def _refuse_existing(self, specs: Mapping[str, ResultSpec]) -> None:
        targets = [self._target(name) for name in specs]
        for target in targets:
            if target.is_dir():
                raise CommandError(f"{target} is a directory: a result needs this name")
        present = [str(target) for target in targets if os.path.lexists(target)]
        if present and not self._replace:
            verb = "exists" if len(present) == 1 else "exist"
            raise CommandError(
                f"{', '.join(present)} {verb} already; --force replaces "
                f"{'it' if len(present) == 1 else 'them'}"
            )

    def _refuse_too_large(self, specs: Mapping[str, ResultSpec]) -> None:
        needed = sum(spec.size_bytes for spec in specs.values())
        free = shutil.disk_usage(self._directory).free
        # Some network file systems do not know, and say 0.
        if needed > free > 0:
            raise CommandError(
                f"{self._directory} has {format_bytes(free)} of free space; "
                f"the results need {format_bytes(needed)}"
            )

    def _discard(self) -> None:
        for file in self._files.values():
            file.discard()
        with contextlib.suppress(OSError):
            for made in self._made:
                made.rmdir()


class _Abilities(NamedTuple):
    """What the file system of the directory can do."""

    nameless: bool
    """Create a file that gets its name later."""
    links: bool
    """Give a file a second name, which fails if the name is taken."""


class _DiskFullError(CommandError):
    """A file is not complete, because the disk, a quota or a size limit is reached."""


class _PendingFile:
    """A file without its final name."""

    def __init__(self, target: Path, spec: ResultSpec, abilities: _Abilities) -> None:
        self.target = target
        self.has_appeared = False
        self._links = abilities.links
        self._hidden = None if abilities.nameless else _hidden_name(target)
        try:
            if self._hidden is None:
                self._fd = _open_nameless(target.parent)
            else:
                self._fd = _create(self._hidden)
            self._file = os.fdopen(self._fd, "wb", buffering=0)
        except OSError as error:
            raise _cannot_write(target.parent, error) from error
        try:
            np.lib.format.write_array_header_1_0(
                self._file,
                {
                    "descr": spec.dtype.numpy.str,
                    "fortran_order": False,
                    "shape": spec.shape,
                },
            )
        except OSError as error:
            self.discard()
            raise _cannot_write(target, error) from error

    def append(self, rows: npt.NDArray[Any]) -> None:
        if not rows.size:
            return
        view = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            raise _cannot_write(self.target, error) from error

    def flush(self) -> None:
        # Some file systems report a full disk only now.
        try:
            os.fsync(self._fd)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise _cannot_write(self.target, error) from error

    def publish(self, *, replace: bool) -> None:
        try:
            if replace:
                self._name().replace(self.target)
            elif self._hidden is None:
                _link_nameless(self._fd, self.target)
            else:
                _rename_new(self._hidden, self.target, links=self._links)
        except FileExistsError:
            raise CommandError(
                f"{self.target} was created meanwhile; --force replaces it"
            ) from None
        except OSError as error:
            raise _cannot_write(self.target, error) from error
        self._hidden = None
        self.has_appeared = True

    def set_aside(self) -> Path | None:
        """Give the file a free name beside its target's, and return it.

        Returns:
            The path; None if the file could not be named.
        """
        aside = self.target.with_name(f"{self.target.stem}.{uuid.uuid4().hex[:8]}.npy")
        kept: Path | None = aside
        try:
            (self.target if self.has_appeared else self._name()).rename(aside)
        except OSError:
            kept = self.target if self.has_appeared else self._hidden
        self._hidden = None
        return kept

    def discard(self) -> None:
        """Discard the file unless it has its name. May be called repeatedly."""
        self._file.close()
        if self._hidden is not None:
            self._hidden.unlink(missing_ok=True)
            self._hidden = None

    def _name(self) -> Path:
        """The file's hidden name; a file without a name gets one."""
        if self._hidden is None:
            hidden = _hidden_name(self.target)
            _link_nameless(self._fd, hidden)
            self._hidden = hidden
        return self._hidden


_FLAGS = os.O_WRONLY | os.O_CLOEXEC

_UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
"""How file systems say that they do not have an operation at all."""

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def _try(directory: Path) -> _Abilities:
    """Find out how files can be created and named in the directory.

    Raises:
        CommandError: Files cannot be created there, or not be named.
    """
    trial = directory / "trial"
    first, second = _hidden_name(trial), _hidden_name(trial)
    try:
        os.close(_create(first))
        try:
            os.link(first, second)
            links = True
        except OSError:
            links = False
            _rename_new(first, second, links=False)
    except OSError as error:
        raise _cannot_write(directory, error) from error
    finally:
        for name in first, second:
            with contextlib.suppress(OSError):
                name.unlink()
    return _Abilities(links and _has_nameless_files(directory), links)


def _create(path: Path) -> int:
    return os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, 0o666)


def _rename_new(path: Path, name: Path, *, links: bool) -> None:
    """Rename a file, and fail if the name is taken.

    Raises:
        OSError: FileExistsError if the name is taken.
    """
    if links:
        os.link(path, name)
        path.unlink()
        return
    # The name is taken first, by an empty file, which is then replaced.
    os.close(_create(name))
    try:
        path.replace(name)
    except BaseException:
        name.unlink()
        raise


def _has_nameless_files(directory: Path) -> bool:
    """Whether the file system supports files that get their name later."""
    try:
        fd = _open_nameless(directory)
        try:
            _link_nameless(fd, hidden := _hidden_name(directory / "trial"))
            hidden.unlink()
        finally:
            os.close(fd)
    except OSError:
        return False
    return True


def _open_nameless(directory: Path) -> int:
    return os.open(directory, _FLAGS | os.O_TMPFILE, 0o666)


def _link_nameless(fd: int, name: Path) -> None:
    # With src_dir_fd, Python calls linkat, which follows the link in /proc.
    os.link(f"/proc/self/fd/{fd}", name, src_dir_fd=fd)


def _hidden_name(target: Path) -> Path:
    return target.with_name(f".{target.stem}.{uuid.uuid4().hex[:8]}.part")


def _cannot_write(path: Path, error: OSError) -> CommandError:
    kind = _DiskFullError if error.errno in _FULL else CommandError
    return kind(f"{path} cannot be written: {error.strerror or error}")
