"""Refuses what converts a model to a dtype that its compressed layers do not compute in, before any of it changes."""

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .._state import APPLY, get_attribute, remove_attribute, set_attribute
from .compressed import Compressed


class ConversionGuard:
    """Stands for the ``_apply`` of a module, through which ``to``, ``double`` and the like convert it.

    ``nn.Module._apply`` goes from layer to layer: when a compressed one refuses, those before it are converted. This
    asks all of them first. It belongs to one module, and to its copy once that is copied or pickled.
    """

    def __init__(self, module: nn.Module):
        self._module = weakref.ref(module)

    def __call__(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        module = self._guarded()
        for name, layer in module.named_modules():
            if isinstance(layer, Compressed) and (reason := layer.refuses_conversion(fn)) is not None:
                raise TypeError(f"layer {name!r} {reason}")
        return type(module)._apply(module, fn, recurse)

    def _guarded(self) -> nn.Module:
        module = self._module()
        assert module is not None  # whose attribute this is
        return module

    def __deepcopy__(self, memo: dict[int, Any]) -> "ConversionGuard":
        return ConversionGuard(memo.get(id(self._guarded()), self._guarded()))

    def __reduce__(self) -> Any:
        return ConversionGuard, (self._guarded(),)


def guard_conversions(model: nn.Module) -> None:
    """Guards every module of ``model`` that holds a compressed layer, and no other one."""
    for module in model.modules():
        if isinstance(module, Compressed):
            continue
        if any(isinstance(layer, Compressed) for layer in module.modules()):
            set_attribute(module, APPLY, ConversionGuard(module))
        elif isinstance(get_attribute(module, APPLY), ConversionGuard):
            remove_attribute(module, APPLY)
