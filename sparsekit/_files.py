"""Files that are written whole or not at all."""

import errno
import os
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

from ._undo import restoring

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

TEMPORARY = ".sk-*.tmp"
ABANDONED = 3600.0  # seconds after which a file without a lock counts as left by a dead process


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a hidden file beside ``path`` for writing; it replaces ``path`` when the block has ended.

    If the block fails or is interrupted, ``path`` is unchanged and no other file is left. If ``path`` is a link, its
    target is replaced. A new file gets its permissions from the umask, an existing one keeps its own. Hidden files that
    a killed process left in the folder are removed; those of running processes are locked, and stay.

    Raises:
        OSError: the file cannot be written; ``filename`` is ``path``. FileNotFoundError if its folder is missing.
    """
    try:
        target, mode = _target_file(Path(path))
        _remove_abandoned(target.parent)
        with _temporary(target.parent) as (file, temporary):
            yield file
            file.flush()
            os.fsync(file.fileno())
            if mode is not None:
                with suppress(OSError):  # a network share may not support permissions
                    os.chmod(temporary, mode)
            if fcntl is None:  # Windows cannot rename an open file
                file.close()
            os.replace(temporary, target)
        _flush_folder(target.parent)
    except OSError as error:
        if error.errno is None or error.filename == os.fspath(path):
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def try_folder(folder: Path) -> None:
    """Makes a folder and checks that files can be written to it, before long work whose result is saved there.

    Raises:
        OSError: files cannot be written there; the message names the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _temporary(folder):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(folder)) from error


def _target_file(path: Path) -> tuple[Path, int | None]:
    """Returns the file that ``path`` is or leads to, and its permissions if it exists."""
    try:
        target = Path(os.path.realpath(path, strict=True))
    except FileNotFoundError:  # a new file, or a link to one
        target = Path(os.path.realpath(path))
        if not target.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, f"there is no folder {target.parent}", os.fspath(path)) from None
        return target, None
    mode = target.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a directory", os.fspath(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is a device, which no file can replace", os.fspath(path))
    return target, stat.S_IMODE(mode) & 0o777


@contextmanager
def _temporary(folder: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """Opens a new file that is locked while it is open, and removed at the end unless it was renamed."""
    while True:
        # The name is known before the file is made, so that it is removed after an interrupt at any point; and it is
        # short, however long the name of the target is.
        path = folder / TEMPORARY.replace("*", secrets.token_hex(8))
        opened: list[BinaryIO] = []
        with restoring(partial(_remove, path, opened)):
            opened.append(open(path, "xb"))
            if lock(opened[0].fileno()) is False or os.fstat(opened[0].fileno()).st_nlink == 0:
                continue  # another process removed it as abandoned before it was locked
            yield opened[0], path
            return


def _remove(path: Path, opened: list[BinaryIO]) -> None:
    for file in opened:
        file.close()
    path.unlink(missing_ok=True)


def _remove_abandoned(folder: Path) -> None:
    """Removes the temporary files that killed processes have left in a folder."""
    for path in folder.glob(TEMPORARY):
        with suppress(OSError):  # the file is another user's, or was removed in the meantime
            with open(path, "r+b", opener=_open_itself) as file:
                free = lock(file.fileno())
                if free:
                    path.unlink()
            if free is None and time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink()


def _open_itself(path: str, flags: int) -> int:
    """Opens a file without following a link, and without waiting for a pipe."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def lock(descriptor: int) -> bool | None:
    """Locks a file until it is closed; returns False if another process has it, None if locks are not supported."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _flush_folder(folder: Path) -> None:
    """Flushes the entries of a folder to the disk; does nothing if the system, as Windows, does not support that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise
