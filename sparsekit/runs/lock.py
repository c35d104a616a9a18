"""The lock of a run's folder, so that two processes never run it at once; a killed process does not keep it."""

import errno
import os
import socket
import time
from pathlib import Path

from .status import SILENT, read_status

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_held: dict[tuple[int, str], int] = {}  # descriptors by process and path: a forked process holds no lock of its parent


def lock_folder(folder: Path) -> None:
    """Locks the folder of a run for this process, which may hold the lock already.

    The lock is one of POSIX: the system releases it however the process ends, forked workers that live longer do not
    keep it, and network folders know it on all machines. Where locks are not supported, the status decides.

    Raises:
        RuntimeError: another process holds it; the message names the process and its machine.
        OSError: the file of the lock cannot be made.
    """
    path = os.path.join(os.path.realpath(folder), ".lock")
    if (os.getpid(), path) in _held:
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        locked, holder = _lock(descriptor), None
        if locked is None:
            holder = _holder(folder)
        elif not locked:
            holder = os.read(descriptor, 512).decode("utf-8", "replace") or "another process"
        if holder is not None:
            raise RuntimeError(f"{folder} is being run by {holder}: wait for it, or name another folder")
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    except BaseException:
        os.close(descriptor)
        raise
    _held[os.getpid(), path] = descriptor


def unlock_folder(folder: Path) -> None:
    """Releases the lock of a folder, if this process holds it."""
    descriptor = _held.pop((os.getpid(), os.path.join(os.path.realpath(folder), ".lock")), None)
    if descriptor is not None:
        os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Returns whether a file could be locked; None if locks are not supported."""
    if fcntl is None:
        return None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EACCES, errno.EAGAIN) else None
    return True


def _holder(folder: Path) -> str | None:
    """Returns which process runs a folder by its status; None if none does."""
    status = read_status(folder)
    if status is None or status.state != "running" or status.process == os.getpid():
        return None
    if status.host == socket.gethostname():
        alive = status.is_alive()
    else:
        alive = time.time() - status.heartbeat < SILENT
    return f"process {status.process} on {status.host}" if alive else None
