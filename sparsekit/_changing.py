"""Changes of a model in place that are made whole or not at all, and by one caller at a time."""

import threading
from collections.abc import Callable
from typing import TypeVar
from weakref import WeakValueDictionary

from torch import nn

from ._undo import Undo

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
        undo.run()
        claim.release()
        raise


class _Claim:
    """One caller's hold on the modules and parameters of a model."""

    def __init__(self, doing: str) -> None:
        self._doing = doing
        self._thread = threading.get_ident()
        self._held: list[int] = []

    def take(self, model: nn.Module) -> None:
        held = [id(part) for part in (*model.modules(), *model.parameters())]
        with _lock:
            for other in filter(None, map(_claims.get, held)):
                who = "already" if other._thread == self._thread else "by another thread"
                raise RuntimeError(f"the model is being {other._doing} {who}; it can be changed again after that")
            self._held = held
            for part in held:
                _claims[part] = self

    def release(self) -> None:
        with _lock:
            for part in self._held:
                if _claims.get(part) is self:
                    del _claims[part]


_lock = threading.RLock()
# Weak, so that a claim ends with its caller even where an interrupt kept it from being released.
_claims: WeakValueDictionary[int, _Claim] = WeakValueDictionary()
