"""Puts a compressed layer in the place of a plain one, and the plain one back."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._replace import (
    Slots,
    check_original_known,
    check_replaceable,
    guard_saving,
    parent_slots,
    release_weight,
    replace_module,
    restored_layer,
)
from .._state import get_original, set_original
from .._undo import Undo
from ..masks import MaskInfo, get_mask_bits, get_mask_info, set_mask_bits
from ..nn import Compressed
from .sites import LayerSite


@dataclass(frozen=True)
class _Emptied:
    """What a plain layer held before ``commit`` emptied it."""

    layer: nn.Linear | nn.Conv2d
    weight: Tensor
    grad: Tensor | None
    bits: Tensor | None
    info: MaskInfo | None


class Swap:
    """The plain layers of a model, which take turns with compressed modules until ``commit`` keeps some of those.

    Both are in memory meanwhile, so that ``undo`` can put the model back as it was, bit for bit.
    """

    def __init__(self, model: nn.Module, sites: Mapping[str, LayerSite]):
        self.model, self.sites = model, sites
        self.emptied: list[_Emptied] = []

    def show(self, modules: Mapping[str, Compressed]) -> None:
        """Puts these modules in the places of the layers of these names, and the plain layers in all others."""
        for name, site in self.sites.items():
            replace_module(modules.get(name, site.layer), site.slots)

    def commit(self, modules: Mapping[str, Compressed]) -> None:
        """Keeps these modules, and frees the memory of the plain layers that they stand for."""
        self.show(modules)
        for name, module in modules.items():
            layer = self.sites[name].layer
            set_original(module, layer)
            bits, info = get_mask_bits(layer), get_mask_info(layer)
            self.emptied.append(_Emptied(layer, layer.weight.data, layer.weight.grad, bits, info))
            release_weight(layer)
        guard_saving(self.model)

    @torch.inference_mode(False)
    def undo(self) -> None:
        """Puts the plain layers back in place, as they were."""
        for each in self.emptied:
            each.layer.weight.data, each.layer.weight.grad = each.weight, each.grad
            if each.bits is not None and each.info is not None:
                set_mask_bits(each.layer, each.bits, each.info)
        self.show({})
        guard_saving(self.model)


def restore_all(model: nn.Module, undo: Undo) -> tuple[str, ...]:
    """Puts the plain layer of every compressed one back, all of them or none, and returns their names.

    Raises:
        ValueError: a layer has hooks, or stands for one of an unknown class.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, Compressed) and name}
    for name, module in found.items():
        check_replaceable(name, module)
        check_original_known(name, module)
    slots = parent_slots(model)
    undo.callback(guard_saving, model)
    for module in found.values():
        undo.callback(_put_back, module, slots[module])
        replace_module(restored_layer(module), slots[module])
    guard_saving(model)
    return tuple(found)


def _put_back(module: Compressed, slots: Slots) -> None:
    replace_module(module, slots)
    if (layer := get_original(module)) is not None:
        release_weight(layer)
