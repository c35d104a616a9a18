"""Folders that are written whole or not at all."""

import ctypes
import errno
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from ._files import ABANDONED, lock
from ._undo import restoring

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # constants of Linux


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Makes a hidden folder beside ``path`` to write to; it replaces ``path`` when the block has ended.

    If the block fails or is interrupted, ``path`` is unchanged and nothing else is left. If ``path`` is a link, its
    target is replaced. All files get the permissions that the umask allows. On Linux the two folders swap their names
    in one step. Elsewhere the old folder is moved aside first; if the process is killed between the two steps, the next
    call in the same parent folder moves it back. Each call also removes hidden folders that killed processes have left.

    Raises:
        OSError: the folder cannot be made.
    """
    target = _target_folder(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    _recover(target.parent)
    # The names are known before the folders are made, so that an interrupt at any point leaves none behind.
    new = target.parent / f".sk-{secrets.token_hex(8)}.tmp"
    with restoring(partial(_clean, new)):
        new.mkdir()
        descriptor, _ = _open_locked(new)
        try:
            if not new.is_dir():  # another process removed it as abandoned before it was locked
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(new))
            yield new
            _apply_umask(new)
            if not target.exists():
                new.rename(target)
            elif not _exchange(new, target):
                _put_aside(target, _old(new))
                new.rename(target)
        finally:
            if descriptor is not None:
                os.close(descriptor)


def try_new_folder(path: str | os.PathLike[str]) -> None:
    """Checks that ``new_folder`` can make ``path``, without making it, before long work whose result is saved there.

    Raises:
        OSError: it cannot; ``filename`` is the parent folder, or a link that leads nowhere.
    """
    parent = next(each for each in _target_folder(path).parents if each.exists())
    trial = parent / f".sk-{secrets.token_hex(8)}.tmp"
    with restoring(partial(_clean, trial)):
        try:
            trial.mkdir()
        except OSError as error:
            raise OSError(error.errno, error.strerror, os.fspath(parent)) from error


def _apply_umask(folder: Path) -> None:
    """Gives all files the permissions that the umask allows, because safetensors makes files for their owner only."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with suppress(OSError):  # a network share may not support permissions
                path.chmod(mode)


def _target_folder(path: str | os.PathLike[str]) -> Path:
    """Returns the folder that ``path`` is or leads to."""
    try:
        return Path(os.path.realpath(path, strict=True))
    except FileNotFoundError:
        return Path(os.path.realpath(path))


def _exchange(one: Path, other: Path) -> bool:
    """Swaps the names of two folders in one step; returns False if the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # a C library from before 2018
        return False
    names = os.fsencode(one), os.fsencode(other)
    if rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):  # an old kernel, or a share
        return False
    raise OSError(number, os.strerror(number), os.fspath(other))


def _old(new: Path) -> Path:
    return new.with_suffix(".old")


def _put_aside(target: Path, aside: Path) -> None:
    """Moves ``target`` into a folder that also stores its name."""
    aside.mkdir()
    (aside / "name").write_text(target.name, encoding="utf-8")
    target.rename(aside / "folder")


def _bring_back(aside: Path) -> None:
    """Undoes ``_put_aside``, unless a new folder is in the old place, and removes the folder that it made."""
    with suppress(FileNotFoundError):
        target = aside.with_name((aside / "name").read_text(encoding="utf-8"))
        if not target.exists():
            (aside / "folder").rename(target)
    if not (aside / "folder").exists() or target.exists():
        shutil.rmtree(aside, ignore_errors=True)


def _clean(new: Path) -> None:
    """Removes a hidden folder; first moves the folder that was put aside for it back, if no other took its place."""
    try:
        _bring_back(_old(new))
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _recover(parent: Path) -> None:
    """Brings back or removes the folders that killed processes have left."""
    for left in {each.with_suffix(".tmp") for suffix in ("tmp", "old") for each in parent.glob(f".sk-*.{suffix}")}:
        with suppress(OSError):
            if not left.exists():
                _clean(left)
            elif left.is_dir():
                descriptor, free = _open_locked(left)
                try:
                    if free or (free is None and time.time() - left.stat().st_mtime > ABANDONED):
                        _clean(left)
                finally:
                    if descriptor is not None:
                        os.close(descriptor)


def _open_locked(folder: Path) -> tuple[int | None, bool | None]:
    """Opens a folder and locks it; returns its descriptor and the result of ``lock``."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows cannot open folders
        return None, None
    return descriptor, lock(descriptor)
