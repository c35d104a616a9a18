"""Stands between a module and its forward, however that is called."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from ._state import FORWARD, get_attribute, remove_attribute, set_attribute
from ._undo import restoring

Around = Callable[..., Any]  # around(forward, *args, **kwargs) runs in place of forward(*args, **kwargs)


@contextmanager
def around_forwards(arounds: Mapping[nn.Module, Around]) -> Iterator[None]:
    """Calls ``arounds[module](forward, *args, **kwargs)`` in place of the forward of each module, until the end.

    Unlike a hook, this sees ``module.forward(x)`` too, as ``checkpoint(module.forward, x)`` calls it, and may leave out
    the forward. The module's own hooks are called as ever.
    """
    own = {module: get_attribute(module, FORWARD) for module in arounds}

    def restore() -> None:
        for module, forward in own.items():
            if forward is None:
                remove_attribute(module, FORWARD)
            else:
                set_attribute(module, FORWARD, forward)

    with restoring(restore):
        for module, around in arounds.items():
            set_attribute(module, FORWARD, _bound(around, module.forward))
        yield


def _bound(around: Around, forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(forward, *args, **kwargs)

    return wrapper
