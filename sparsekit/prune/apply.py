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
    parts = list(zip(chunks(weight), chunks(pruned), strict=True))
    counts = [torch.count_nonzero(old.view(bits) != new.view(bits)) for old, new in parts]
    # Made whole before the small pieces, which would leave holes in the memory behind it.
    values = weight.new_empty(int(sum(counts)))
    where = torch.empty((len(weight), -(-weight.shape[1:].numel() // 8)), dtype=torch.uint8, device=weight.device)
    start, rows = 0, where.split(_rows(weight))
    for (old, new), count, packed in zip(parts, counts, rows, strict=True):
        changed = old.view(bits) != new.view(bits)
        packed.copy_(pack_bits(changed.flatten(1)))
        values[start : start + int(count)] = old[changed]
        start += int(count)
    module, parameter = layer.module, layer.parameter
    mask, info = get_mask_bits(module, parameter), get_mask_info(module, parameter)

    def restore() -> None:
        start = 0
        for part, packed in zip(chunks(weight), where.split(_rows(weight)), strict=True):
            changed = unpack_bits(packed, part.shape[1:].numel()).view(part.shape)
            end = start + int(torch.count_nonzero(changed))
            part.masked_scatter_(changed, values[start:end])
            start = end
        torch.clear_autocast_cache()
        if mask is None or info is None:
            remove_mask(module, parameter)
        else:
            set_mask_bits(module, mask, info, parameter)

    return restore


def chunks(weight: Tensor) -> Iterator[Tensor]:
    """A weight in parts of whole rows, to look at in little memory."""
    yield from weight.split(_rows(weight))


def _rows(weight: Tensor) -> int:
    return max(CHUNK // max(weight.shape[1:].numel(), 1), 1)
