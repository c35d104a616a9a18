"""What brings things back to how they were, also where an interrupt comes into the middle of it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import ref

if TYPE_CHECKING:  # files are written without torch, too
    from torch import nn

T = TypeVar("T")

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


def change(model: "nn.Module", doing: str, work: Callable[[Undo], T]) -> T:
    """Returns ``work(undo)``. Whatever that raises, interrupts included, everything in ``undo`` is undone first.

    Args:
        model: what is changed. Nobody else may change it, or a model that shares modules or weights with it, meanwhile.
        doing: for the sentence that the other one gets: ``"pruned"``.
        work: changes the model in place.

    Raises:
        RuntimeError: the model is being changed already.
    """
    undo, claim = Undo(), _Claim(doing)
    try:
        claim.take(model)
        result = work(undo)
        claim.release()
        return result  # the last line: nothing can fail once the change stays
    except BaseException:
        try:
            undo.run()
        finally:
            undo.run()  # what is left where an interrupt came between two steps
            claim.release()
        raise


@contextmanager
def claiming(model: "nn.Module", doing: str) -> Iterator[None]:
    """Keeps others from changing a model meanwhile, as ``change`` does.

    Raises:
        RuntimeError: the model is being changed already.
    """
    claim = _Claim(doing)
    with restoring(claim.release):
        claim.take(model)
        yield


class _Claim:
    """One caller's hold on the modules and parameters of a model."""

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
                _claims.pop(part, None)  # left behind by an interrupt

    def release(self) -> None:
        for part in self._parts:
            if _claims.get(part) is self._own:
                del _claims[part]


# Who holds what, by id. Without a lock, which an interrupt could leave locked: to set a key of a dict is one step.
_claims: dict[int, ref[_Claim]] = {}
