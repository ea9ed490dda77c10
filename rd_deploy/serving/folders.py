"""A whole folder put in the place of another in one step: who looks sees the old one or the new one, no mixture."""

import contextlib
import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rd_deploy.common import UserError

PREFIX = ".rd-export-"  # of temporary folders
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
# What renameat2 says where the kernel or the file system cannot exchange.
CANNOT_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}


@contextlib.contextmanager
def atomic_folder(path: Path, workplace: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it takes the place of ``path``, on failure nothing has changed.

    ``workplace``: an existing folder where the new one is put together; if that is on another mount, which can be of
    the same file system, the new one is copied beside ``path`` before it takes the place. ``path`` does not exist, or
    is a folder that is removed. Raises `UserError` when the system refuses.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=PREFIX, dir=workplace) as temporary:
            new = Path(temporary) / "new"
            new.mkdir()  # not the temporary folder itself, which is private: outputs follow the user's umask
            yield new
            _sync(new)
            try:
                _put(new, path)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                _put_copy(new, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another folder") from error


def _sync(folder: Path) -> None:
    """Have the files on the disk before their names are, or a power cut could leave empty ones."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _put(new: Path, path: Path) -> None:
    """Move ``new`` to ``path``; a folder that was there ends up beside where ``new`` was."""
    if not path.exists():
        new.rename(path)
    elif not _exchange(new, path):
        _replace_in_two_steps(new, path)


def _put_copy(new: Path, path: Path) -> None:
    """The same from another mount."""
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=path.parent) as temporary:
        copy = Path(temporary) / "new"
        shutil.copytree(new, copy)
        _sync(copy)
        _put(copy, path)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step; False where the system cannot (not Linux, or NFS)."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))


def _replace_in_two_steps(new: Path, path: Path) -> None:
    """For a moment ``path`` does not exist; when the second step fails, the old folder is put back."""
    old = new.with_name("old")
    path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        old.rename(path)
        raise
