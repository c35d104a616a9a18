"""The linear layers of a model that may be swapped, and where they hang."""

from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from .._layers import Where, borrowed, input_dim, is_transposed
from .candidates import unfit

Slots = list[tuple[nn.Module, str]]


@dataclass
class LinearSite:
    """A linear layer: where it hangs, the calls it gets by token bucket, and why it must stay, if it must."""

    name: str
    layer: nn.Linear
    slots: Slots
    reason: str | None
    shape: tuple[int, int]  # (out_features, in_features)
    calls: Counter[int] = field(default_factory=Counter)


def find_sites(model: nn.Module, where: Where | None) -> list[LinearSite]:
    """Every linear layer that ``where`` selects, in the order of ``named_modules``."""
    slots, lent = parent_slots(model), borrowed(model)
    sites = []
    for name, layer in model.named_modules():
        if input_dim(layer) is None or isinstance(layer, nn.Conv2d) or (where is not None and not where(name, layer)):
            continue
        reason = unfit(layer) or lent.get(layer)
        if layer is model:
            reason = "it is the model itself: use from_linear of Linear24, TieredLinear or PrepackedLinear"
        rows, cols = layer.weight.shape
        shape = (cols, rows) if is_transposed(layer) else (rows, cols)
        sites.append(LinearSite(name, layer, slots.get(layer, []), reason, shape))
    return sites


def parent_slots(model: nn.Module) -> dict[nn.Module, Slots]:
    """The slots of every module: one that two parents share has two."""
    found: dict[nn.Module, Slots] = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if child is not None:
                found.setdefault(child, []).append((parent, attribute))
    return found
