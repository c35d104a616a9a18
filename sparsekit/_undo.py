"""Changes that are made completely or undone completely, even if an interrupt comes at any point."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import ref

if TYPE_CHECKING:  # files can be written without torch
    from torch import nn

T = TypeVar("T")

INTERRUPTS = 10  # a step that was interrupted this often is given up


@contextmanager
def restoring(restore: Callable[[], None]) -> Iterator[None]:
    """Calls ``restore`` at the end, twice, because an interrupt may come just before or during the first call.

    Args:
        restore: brings back the earlier state. It may be called more than once, and before the change is complete.
    """
    try:
        try:
            yield
        finally:
            restore()
    finally:
        restore()


class Undo:
    """The steps that undo what has been done so far, in reverse order."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []

    def callback(self, step: Callable[..., object], *args: Any) -> None:
        """Adds the step that undoes the change to come; it must be harmless without that change, and if repeated."""
        self._steps.append(lambda: step(*args))

    def commit(self) -> None:
        """Drops all steps: what was done stays."""
        self._steps = []

    def run(self) -> None:
        """Runs all steps, the last one first; a step that fails is tried twice. Raises the first error at the end.

        A step that was interrupted is run again, because the interrupt does not mean that the step fails.
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
    """Yields an ``Undo`` whose steps are run at the end, unless ``commit`` was called before."""
    undo = Undo()
    with restoring(undo.run):
        yield undo


def change(model: "nn.Module", doing: str, work: Callable[[Undo], T]) -> T:
    """Returns ``work(undo)``; if that fails or is interrupted, runs all steps of ``undo`` and raises the error again.

    Args:
        model: the model that is changed. Meanwhile, nothing else can change it, or a model that shares modules or
            weights with it.
        doing: a participle for the error message that a second caller gets, such as ``"pruned"``.
        work: changes the model in place.

    Raises:
        RuntimeError: the model is being changed already.
    """
    undo, claim = Undo(), _Claim(doing)
    try:
        claim.take(model)
        result = work(undo)
        claim.release()
        return result  # the last line, so that nothing can fail after the change is final
    except BaseException:
        try:
            undo.run()
        finally:
            undo.run()  # runs the steps that are left if an interrupt came between two of them
            claim.release()
        raise


@contextmanager
def claiming(model: "nn.Module", doing: str) -> Iterator[None]:
    """Prevents other changes of a model until the end, as ``change`` does.

    Raises:
        RuntimeError: the model is being changed already.
    """
    claim = _Claim(doing)
    with restoring(claim.release):
        claim.take(model)
        yield


class _Claim:
    """The exclusive claim of one caller on the modules and parameters of a model."""

    def __init__(self, doing: str) -> None:
        self._doing = doing
        self._thread = threading.get_ident()
        self._own = ref(self)
        self._parts: list[int] = []

    def take(self, model: "nn.Module") -> None:
        self._parts = [id(part) for part in (*model.modules(), *model.parameters())]
        for part in self._parts:
            while (holder := _claims.setdefault(part, self._own)) is not self._own:
                other = holder()
                if other is not None:
                    who = "already" if other._thread == self._thread else "by another thread"
                    raise RuntimeError(f"the model is being {other._doing} {who}; it can be changed when that is done")
                _claims.pop(part, None)  # an interrupt kept its holder from releasing it

    def release(self) -> None:
        for part in self._parts:
            if _claims.get(part) is self._own:
                del _claims[part]


# The claim on each module and parameter, by id. There is no lock, because an interrupt could leave it locked; setting a
# key of a dict is atomic.
_claims: dict[int, ref[_Claim]] = {}
