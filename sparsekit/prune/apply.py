"""Puts a pruned weight and its mask into a layer, and knows how to get the layer back."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .._undo import Undo
from ..masks import MaskInfo, Pattern, get_mask_bits, get_mask_info, remove_mask, set_mask, set_mask_bits
from ..ops import pack_bits, unpack_bits
from .layers import Layer

BITS = {2: torch.int16, 4: torch.int32}
CHUNK = 2**20  # weights that are compared at a time: picking from them takes 16 bytes each on a CPU


def apply_mask(layer: Layer, pruned: Tensor, mask: Tensor, pattern: Pattern, undo: Undo) -> None:
    """Writes a weight and its mask, both of the weight's own shape; ``undo`` takes the way back."""
    weight = layer.weight.detach()
    undo.callback(_way_back(layer, weight, pruned))
    weight.copy_(pruned)
    torch.clear_autocast_cache()  # it may hold the weight as it was, in another dtype
    set_mask(layer.module, mask, MaskInfo(pattern, layer.axis), layer.parameter)


def _way_back(layer: Layer, weight: Tensor, pruned: Tensor) -> Callable[[], None]:
    """Notes the values that change, with one bit for each weight, and the mask as it is stored."""
    bits = BITS[weight.element_size()]  # compared as bits: -0.0 must come back too
    wheres, kept = [], []
    for old, new in zip(_chunks(weight), _chunks(pruned), strict=True):
        changed = old.view(bits) != new.view(bits)
        wheres.append(pack_bits(changed.flatten(1)))
        kept.append(old[changed])
    where, values = torch.cat(wheres), torch.cat(kept)
    module, parameter = layer.module, layer.parameter
    mask, info = get_mask_bits(module, parameter), get_mask_info(module, parameter)

    def restore() -> None:
        start = 0
        for part, packed in zip(_chunks(weight), where.split(_rows(weight)), strict=True):
            changed = unpack_bits(packed, part.shape[1:].numel()).view(part.shape)
            end = start + int(changed.sum())
            part.masked_scatter_(changed, values[start:end])
            start = end
        torch.clear_autocast_cache()
        if mask is None or info is None:
            remove_mask(module, parameter)
        else:
            set_mask_bits(module, mask, info, parameter)

    return restore


def _chunks(weight: Tensor) -> Iterator[Tensor]:
    yield from weight.split(_rows(weight))


def _rows(weight: Tensor) -> int:
    return max(CHUNK // max(weight.shape[1:].numel(), 1), 1)
