"""A guard against converting a model to a dtype that its compressed layers do not compute in."""

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .._state import APPLY, get_attribute, remove_attribute, set_attribute
from .compressed import Compressed


class ConversionGuard:
    """A replacement for the ``_apply`` of a module, through which ``to``, ``double`` and the like convert it.

    ``nn.Module._apply`` converts layer after layer, so when a compressed layer raises an error, the layers before it
    are converted already. The guard asks all compressed layers before any layer is converted. It is an attribute of one
    module; a copied or unpickled module gets a guard of its own.
    """

    def __init__(self, module: nn.Module):
        self._module = weakref.ref(module)

    def __call__(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        module = self._guarded()
        for name, layer in module.named_modules():
            if isinstance(layer, Compressed) and (error := layer.conversion_error(fn)) is not None:
                raise TypeError(f"layer {name!r} {error}")
        return type(module)._apply(module, fn, recurse)

    def _guarded(self) -> nn.Module:
        module = self._module()
        assert module is not None  # the guard is its attribute, and does not outlive it
        return module

    def __deepcopy__(self, memo: dict[int, Any]) -> "ConversionGuard":
        return ConversionGuard(memo.get(id(self._guarded()), self._guarded()))

    def __reduce__(self) -> Any:
        return ConversionGuard, (self._guarded(),)


def guard_conversions(model: nn.Module) -> None:
    """Puts a guard on every module of ``model`` that holds a compressed layer, and removes it from the others."""
    for module in model.modules():
        if isinstance(module, Compressed):
            continue
        if any(isinstance(layer, Compressed) for layer in module.modules()):
            set_attribute(module, APPLY, ConversionGuard(module))
        elif isinstance(get_attribute(module, APPLY), ConversionGuard):
            remove_attribute(module, APPLY)
