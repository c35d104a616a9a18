"""Puts a pruned weight and its mask into a layer, and knows how to get the layer back."""

from contextlib import ExitStack

import torch
from torch import Tensor

from ..masks import MaskInfo, Pattern, get_mask_bits, get_mask_info, remove_mask, set_mask, set_mask_bits
from ..ops import pack_bits, unpack_bits
from .layers import Layer

BITS = {2: torch.int16, 4: torch.int32}


def put(layer: Layer, pruned: Tensor, mask: Tensor, pattern: Pattern, undo: ExitStack) -> None:
    """Writes a weight and its mask, both of the weight's own shape; ``undo`` takes the way back."""
    weight = layer.weight.detach()
    _remember(undo, layer, weight, pruned)
    weight.copy_(pruned)
    set_mask(layer.module, mask, MaskInfo(pattern, layer.axis), layer.parameter)


def _remember(undo: ExitStack, layer: Layer, weight: Tensor, pruned: Tensor) -> None:
    """Notes how to get the layer back: the values that change, one bit for each weight, and the mask it had."""
    bits = BITS[weight.element_size()]  # compared as bits: -0.0 must come back too
    changed = weight.view(bits) != pruned.view(bits)
    where, values = pack_bits(changed.flatten(1)), weight.masked_select(changed)
    module, parameter = layer.module, layer.parameter
    mask, info = (
        get_mask_bits(module, parameter),
        get_mask_info(module, parameter),
    )  # as stored: the mask may be of an earlier shape

    def restore() -> None:
        changed = unpack_bits(where, weight.shape[1:].numel()).view(weight.shape)
        weight.masked_scatter_(changed, values)
        if mask is None or info is None:
            remove_mask(module, parameter)
        else:
            set_mask_bits(module, mask, info, parameter)

    undo.callback(restore)
