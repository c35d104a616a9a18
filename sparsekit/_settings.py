"""Settings of the whole process that calls change for a while, from any number of threads."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Generic, TypeVar

from ._undo import restoring

Value = TypeVar("Value")


class SharedSetting(Generic[Value]):
    """A setting that holds for all threads: the first user changes it, and the last one restores it.

    If each user restored what it had found, the last one of two that overlap would bring back the change of the first.

    Args:
        read: returns the value to restore.
        change: sets the value that users need. Every user calls it, and an interrupt may come at any of its lines.
        restore: sets an earlier value; it may be called again.
    """

    def __init__(
        self, read: Callable[[], Value], change: Callable[[], object], restore: Callable[[Value], object]
    ) -> None:
        self._read, self._change, self._restore = read, change, restore
        self._lock = threading.RLock()
        self._users: dict[object, Value] = {}  # the value that the first user has found, for each of them

    @contextmanager
    def changed(self) -> Iterator[None]:
        """Changes the setting inside the ``with``."""
        user = object()

        def leave() -> None:
            with self._locked():
                if list(self._users) == [user]:
                    self._restore(self._users[user])
                self._users.pop(user, None)

        with restoring(leave):
            with self._locked():
                self._users[user] = next(iter(self._users.values())) if self._users else self._read()
                self._change()
            yield

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds the lock inside the ``with``, and never after it, at whatever line an interrupt comes."""

        def release() -> None:
            with suppress(RuntimeError):  # this thread does not hold it (any more)
                while True:
                    self._lock.release()

        with restoring(release):
            self._lock.acquire()
            yield
