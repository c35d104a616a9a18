"""Changes of a model in place that are made whole or not at all, and by one caller at a time."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar
from weakref import ref

from torch import nn

from ._undo import Undo, restoring

T = TypeVar("T")


def change(model: nn.Module, doing: str, work: Callable[[Undo], T]) -> T:
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
def claiming(model: nn.Module, doing: str) -> Iterator[None]:
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

    def take(self, model: nn.Module) -> None:
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
