"""Replaces layers of a model by compressed ones, and compressed ones by the layers that they replaced."""

from torch import nn

from ._layers import hooks_reason
from ._pretrained import SavePretrained, has_config
from ._state import SAVE_PRETRAINED, SLIM_PLAN, get_attribute, get_original, remove_attribute, set_attribute
from .masks import remove_mask
from .nn import Compressed
from .nn.common import carry_mask
from .nn.conversion_guard import guard_conversions

Slots = list[tuple[nn.Module, str]]  # the parents of a module, each with the name of the attribute that holds it


def parent_slots(model: nn.Module) -> dict[nn.Module, Slots]:
    """Returns the slots of every module below ``model``; a module that two parents share has two."""
    found: dict[nn.Module, Slots] = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if child is not None:
                found.setdefault(child, []).append((parent, attribute))
    return found


def replace_module(module: nn.Module, slots: Slots) -> None:
    """Puts ``module`` into all of these slots."""
    for parent, attribute in slots:
        parent._modules[attribute] = module


def check_original_known(name: str, module: Compressed) -> None:
    """Rejects a transposed layer that did not replace another one, because the class of its dense form is unknown.

    Raises:
        ValueError: names the layer.
    """
    if module.transposed and get_original(module) is None:
        raise ValueError(f"layer {name!r} stands for a layer of an unknown class; only an nn.Linear can be made anew")


def check_replaceable(name: str, module: nn.Module) -> None:
    """Rejects a layer with hooks or a replaced forward, which would be lost with it.

    Raises:
        ValueError: names the layer.
    """
    if reason := hooks_reason(module):
        raise ValueError(f"layer {name!r} cannot be replaced: {reason}, which would be lost; remove that first")


def release_weight(layer: nn.Linear | nn.Conv2d) -> None:
    """Frees the memory of a layer's weight and its mask; the Parameter stays the same object."""
    layer.weight.grad = None
    layer.weight.data = layer.weight.data.new_empty(0)
    remove_mask(layer)


def restored_layer(module: Compressed) -> nn.Module:
    """Returns the layer that ``module`` replaced, with its weight, bias, mask and flags; else a new plain one."""
    dense, layer = module.to_plain(), get_original(module)
    if layer is None:
        return dense
    made = dense.get_parameter("weight")
    weight = made.detach().t().contiguous() if module.transposed else made.detach()
    if weight.device.type == layer.weight.device.type:
        layer.weight.data = weight
    else:
        layer.weight = nn.Parameter(weight)
    layer.weight.requires_grad_(made.requires_grad)
    layer.register_parameter("bias", module.bias)
    layer.training = module.training
    carry_mask(module, layer)
    return layer


def guard_saving(model: nn.Module) -> None:
    """Makes ``save_pretrained`` of every module that holds a compressed layer, or is slim, write what ``save`` does.

    The former also refuse to be converted to dtypes in which their compressed layers cannot compute.
    """
    guard_conversions(model)
    for parent in model.modules():
        if not callable(getattr(parent, "save_pretrained", None)):
            continue
        slim = get_attribute(parent, SLIM_PLAN) is not None and has_config(parent)
        if slim or any(isinstance(module, Compressed) for module in parent.modules()):
            set_attribute(parent, SAVE_PRETRAINED, SavePretrained(parent))
        elif isinstance(get_attribute(parent, SAVE_PRETRAINED), SavePretrained):
            remove_attribute(parent, SAVE_PRETRAINED)
