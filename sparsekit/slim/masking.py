"""``mask_units_``: writes zeros in the places of the units that a plan drops, and stores them as masks."""

import torch
from torch import Tensor, nn

from .._layers import check_model
from .._undo import Undo, change
from ..masks import MaskInfo, Pattern, get_mask_bits, get_mask_info, remove_mask, set_mask, set_mask_bits
from .check import check_fits
from .plan import SlimPlan
from .resize import channels, replace_parameter, sides, weight_dim


def mask_units_(model: nn.Module, plan: SlimPlan) -> None:
    """Writes zeros in the places of the units that a plan drops, and stores masks, which ``keep_masks`` keeps.

    The rows and biases of the layers that write a unit become zero, and the columns of the layer that reads it. All
    layers of the plan's branches get masks, also where nothing is dropped yet, so that ``keep_masks`` can be called
    once and follows as more is dropped. Stages are not masked: drop them by ``slim_``, and train what is left. Until it
    returns, the call takes a byte for each weight of the branches.

    Args:
        model: a model that the plan fits.
        plan: what stays.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: the plan does not fit the model, which is as it was.
        RuntimeError: the model is being changed already.
    """
    check_model(model)
    check_fits(model, plan, whole=True)

    def work(undo: Undo) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for layer, masks in unit_masks(model, plan).items():
                for name, mask in masks.items():
                    write_mask(layer, name, mask, undo)

    change(model, "masked", work)


def write_mask(layer: nn.Module, name: str, mask: Tensor, undo: Undo) -> None:
    """Stores the mask of a parameter and zeroes what it drops; ``undo`` records how to restore both."""
    info = get_mask_info(layer, name)
    if info is not None and (info.pattern.m is not None or info.pattern.tiers):
        raise ValueError(f"a layer has a mask of the pattern {info.pattern}: mask units or rows first, then prune it")
    value, dropped = layer.get_parameter(name).detach(), ~mask
    undo.callback(_restore, layer, name, value, dropped, value[dropped], get_mask_bits(layer, name), info)
    value.masked_fill_(dropped, 0)
    torch.clear_autocast_cache()
    pattern = Pattern(ratio=float(dropped.sum()) / dropped.numel(), unit="layer")
    set_mask(layer, mask, MaskInfo(pattern, weight_dim(layer, "inputs") if name == "weight" else 0), name)


def _restore(
    layer: nn.Module,
    name: str,
    value: Tensor,
    dropped: Tensor,
    values: Tensor,
    bits: Tensor | None,
    info: MaskInfo | None,
) -> None:
    value.masked_scatter_(dropped, values)
    torch.clear_autocast_cache()
    if bits is None or info is None:
        remove_mask(layer, name)
    else:
        set_mask_bits(layer, bits, info, name)


def unit_masks(model: nn.Module, plan: SlimPlan) -> dict[nn.Module, dict[str, Tensor]]:
    """Returns the masks of weights and biases, for every layer of the plan's branches."""
    found: dict[nn.Module, dict[str, Tensor]] = {}
    for branch, kept in plan.units.items():
        dropped = sorted({*range(branch.units)} - {*kept})
        for layer, side, width, segments in sides(branch, model):
            weight, bias = layer.get_parameter("weight"), layer._parameters.get("bias")
            masks = found.setdefault(layer, {"weight": _all(weight)})
            index = channels(dropped, branch.units, width, segments).to(weight.device)
            masks["weight"].index_fill_(weight_dim(layer, side), index, False)
            if side == "outputs" and bias is not None:
                masks.setdefault("bias", _all(bias)).index_fill_(0, index, False)
    return found


def zero_units(model: nn.Module, plan: SlimPlan, undo: Undo) -> None:
    """Writes zeros in the places of dropped units, in new parameters; ``undo`` records how to restore the old ones."""
    for layer, masks in unit_masks(model, plan).items():
        for name, mask in masks.items():
            replace_parameter(layer, name, layer.get_parameter(name).detach().masked_fill(~mask, 0), undo)


def _all(parameter: Tensor) -> Tensor:
    return torch.ones(parameter.shape, dtype=torch.bool, device=parameter.device)
