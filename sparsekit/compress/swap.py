"""Puts a compressed layer in the place of a plain one, and the plain one back."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .._layers import hooks_reason
from .._undo import Undo
from ..masks import MaskInfo, get_mask_bits, get_mask_info, remove_mask, set_mask_bits
from ..nn import Compressed, carry_mask, guard_conversions
from .sites import LinearSite, Slots, parent_slots


@dataclass(frozen=True)
class Original:
    """The layer that a module stands for, emptied; a plain object, so that ``nn.Module`` does not register it."""

    layer: nn.Module


def set_original(module: Compressed, layer: nn.Module) -> None:
    """Notes that ``module`` stands for ``layer``, which ``decompress_`` brings back."""
    module.__dict__["original"] = Original(layer)


def get_original(module: nn.Module) -> nn.Linear | None:
    """The layer that ``module`` stands for, without its weight; None where it stands for none."""
    original: Original | None = module.__dict__.get("original")
    return None if original is None else original.layer  # type: ignore[return-value]


@dataclass(frozen=True)
class _Emptied:
    """What a layer held."""

    layer: nn.Linear
    weight: Tensor
    grad: Tensor | None
    bits: Tensor | None
    info: MaskInfo | None


class Swap:
    """Compressed modules that take turns with the layers they stand for, until one of both is kept for good.

    Both are in memory meanwhile: whatever fails before ``commit`` has returned, ``undo`` leaves the model as it was,
    bit for bit.
    """

    def __init__(self, model: nn.Module, built: Mapping[str, tuple[LinearSite, Compressed]]):
        self.model = model
        self.sites = {name: site for name, (site, _) in built.items()}
        self.modules = {name: module for name, (_, module) in built.items()}
        self.emptied: list[_Emptied] = []

    def show(self, names: Collection[str]) -> None:
        """Hangs the compressed modules of these names, and the plain layers of all others."""
        for name, module in self.modules.items():
            site = self.sites[name]
            replace_module(module if name in names else site.layer, site.slots)

    def commit(self, names: Collection[str]) -> None:
        """Keeps the compressed modules of these names, and gives the memory of the layers they stand for back."""
        self.show(names)
        for name in names:
            layer = self.sites[name].layer
            set_original(self.modules[name], layer)
            bits, info = get_mask_bits(layer), get_mask_info(layer)
            self.emptied.append(_Emptied(layer, layer.weight.data, layer.weight.grad, bits, info))
            empty(layer)
        guard_saving(self.model)

    @torch.inference_mode(False)
    def undo(self) -> None:
        """Hangs the plain layers, as they were."""
        for each in self.emptied:
            each.layer.weight.data, each.layer.weight.grad = each.weight, each.grad
            if each.bits is not None and each.info is not None:
                set_mask_bits(each.layer, each.bits, each.info)
        self.show(())
        guard_saving(self.model)


def restore_all(model: nn.Module, undo: Undo) -> tuple[str, ...]:
    """Hangs the plain layer of every compressed one, all of them or none; returns their names.

    Raises:
        ValueError: a layer has hooks, or stands for one of another class than ``nn.Linear`` and nobody noted which.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, Compressed) and name}
    for name, module in found.items():
        check_replaceable(name, module)
        check_known(name, module)
    slots = parent_slots(model)
    undo.callback(guard_saving, model)
    for module in found.values():
        undo.callback(_put_back, module, slots[module])
        replace_module(refill(module), slots[module])
    guard_saving(model)
    return tuple(found)


def _put_back(module: Compressed, slots: Slots) -> None:
    replace_module(module, slots)
    if (layer := get_original(module)) is not None:
        empty(layer)


def check_known(name: str, module: Compressed) -> None:
    """Rejects a transposed layer that nobody swapped in: the class of the layer it stands for is unknown."""
    if module.transposed and get_original(module) is None:
        raise ValueError(f"layer {name!r} stands for a layer of an unknown class, only an nn.Linear can be made anew")


def check_replaceable(name: str, module: nn.Module) -> None:
    """Rejects a layer on which something hangs that the one in its place would not have."""
    if reason := hooks_reason(module):
        raise ValueError(f"layer {name!r} cannot be replaced: {reason}, which would be lost; remove that first")


def empty(layer: nn.Linear) -> None:
    """Gives the weight's memory back; its Parameter stays, for whoever holds it."""
    layer.weight.grad = None
    layer.weight.data = layer.weight.data.new_empty(0)
    remove_mask(layer)


def refill(module: Compressed) -> nn.Linear:
    """The layer that ``module`` stands for, with its weight, bias, mask and flags; else a new ``nn.Linear``."""
    dense, layer = module.to_linear(), get_original(module)
    if layer is None:
        return dense
    weight = dense.weight.detach().t().contiguous() if module.transposed else dense.weight.detach()
    if weight.device.type == layer.weight.device.type:
        layer.weight.data = weight
    else:
        layer.weight = nn.Parameter(weight)
    layer.weight.requires_grad_(dense.weight.requires_grad)
    layer.register_parameter("bias", module.bias)
    layer.training = module.training
    carry_mask(module, layer)
    return layer


def guard_saving(model: nn.Module) -> None:
    """Makes ``save_pretrained`` raise wherever the model has it above a compressed layer, and nowhere else.

    Conversions to dtypes that compressed layers do not compute in are refused there as well.
    """
    guard_conversions(model)
    for parent in model.modules():
        if not callable(getattr(parent, "save_pretrained", None)):
            continue
        if any(isinstance(module, Compressed) for module in parent.modules()):
            parent.__dict__["save_pretrained"] = _refuse_save_pretrained
        elif parent.__dict__.get("save_pretrained") is _refuse_save_pretrained:
            del parent.__dict__["save_pretrained"]


def _refuse_save_pretrained(*args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError(
        "save_pretrained cannot write a compressed model, because nothing could load it: "
        "use sparsekit.save, or call sparsekit.decompress_ first"
    )


def replace_module(module: nn.Module, slots: Slots) -> None:
    for parent, attribute in slots:
        parent._modules[attribute] = module
