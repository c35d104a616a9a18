"""What brings things back to how they were, also where an interrupt comes into the middle of it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

INTERRUPTS = 10  # of one step: more of them than that are no accident


@contextmanager
def restoring(restore: Callable[[], None]) -> Iterator[None]:
    """Calls ``restore`` at the end, twice: an interrupt may come into the first call, or just before it.

    Args:
        restore: sets things to how they were, however often it is called and however far the change had come.
    """
    try:
        try:
            yield
        finally:
            restore()
    finally:
        restore()


class Undo:
    """The steps that take back what has been done so far, the last one first."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []

    def callback(self, step: Callable[..., object], *args: Any) -> None:
        """Adds a step: to be called before the change that it takes back, and harmless without it or when repeated."""
        self._steps.append(lambda: step(*args))

    def commit(self) -> None:
        """Forgets all steps: what was done stays."""
        self._steps = []

    def run(self) -> None:
        """Takes all steps, twice those that fail; raises what failed first when all are taken.

        One that is interrupted is taken again, whatever interrupts it: that says nothing of the step.
        """
        failed: BaseException | None = None
        tries = 0
        while self._steps:
            try:
                self._steps[-1]()
            except BaseException as error:
                failed = failed or error
                tries += 1
                if tries < (2 if isinstance(error, Exception) else INTERRUPTS):
                    continue
            self._steps.pop()
            tries = 0
        if failed is not None:
            raise failed


@contextmanager
def undoing() -> Iterator[Undo]:
    """Gives an ``Undo`` whose steps are taken at the end, unless ``commit`` was called before."""
    undo = Undo()
    with restoring(undo.run):
        yield undo
