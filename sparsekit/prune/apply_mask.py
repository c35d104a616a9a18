"""Writes a pruned weight and its mask into a layer, and records how to undo that."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .._undo import Undo
from ..masks import MaskInfo, Pattern, get_mask_bits, get_mask_info, remove_mask, set_mask, set_mask_bits
from ..ops import pack_bits, unpack_bits
from .layers import PrunableLayer

BITS = {2: torch.int16, 4: torch.int32}  # the integer dtype of the same size, by bytes
CHUNK = 2**20  # weights that are compared at a time: picking from them takes 16 bytes each on a CPU


def apply_mask(layer: PrunableLayer, pruned: Tensor, mask: Tensor, pattern: Pattern, undo: Undo) -> None:
    """Writes a weight and its mask, both in the weight's own shape; ``undo`` records how to restore the layer."""
    weight = layer.weight.detach()
    undo.callback(_make_restore(layer, weight, pruned))
    weight.copy_(pruned)
    torch.clear_autocast_cache()  # it may hold a copy of the old weight in another dtype
    set_mask(layer.module, mask, MaskInfo(pattern, layer.axis), layer.parameter)


def _make_restore(layer: PrunableLayer, weight: Tensor, pruned: Tensor) -> Callable[[], None]:
    """Saves the values that change, with one bit per weight, and the stored mask; returns what restores them."""
    bits = BITS[weight.element_size()]  # comparing bits tells -0.0 from 0.0, so that it is restored too
    parts = list(zip(chunks(weight), chunks(pruned), strict=True))
    counts = [torch.count_nonzero(old.view(bits) != new.view(bits)) for old, new in parts]
    # One large tensor, allocated before small ones are: those would leave holes in the heap.
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
    """Yields a weight in parts of whole rows, so that comparing it takes little memory."""
    yield from weight.split(_rows(weight))


def _rows(weight: Tensor) -> int:
    return max(CHUNK // max(weight.shape[1:].numel(), 1), 1)
