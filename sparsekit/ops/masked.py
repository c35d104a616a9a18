"""A weight with zeros where a mask, given as bits, drops entries."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._define import check_ints, check_like, check_weight, define
from .bits import unpack_bits


def masked_weight_reference(weight: Tensor, bits: Tensor, full: int) -> Tensor:
    rows, cols, taps = weight.shape
    kept = unpack_bits(bits, rows * taps * full).view(rows, taps, full).transpose(1, 2)
    return torch.where(F.pad(kept, (0, 0, 0, cols - full), value=True), weight, 0).contiguous()


def _fake(weight: Tensor, bits: Tensor, full: int) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


_masked_weight = define(masked_weight_reference, _fake)


@torch.no_grad()
def masked_weight(weight: Tensor, bits: Tensor, full: int) -> Tensor:
    """Returns a weight with zeros where a mask drops entries, in one pass over the weight and the bits of the mask.

    Dropped entries become 0, whatever they are; kept ones are copied.

    Args:
        weight: ``[rows, cols, taps]``, float32, float16 or bfloat16, any strides. The weight of a linear layer has one
            tap; that of a convolution ``weight.flatten(2)``.
        bits: the mask, uint8 ``[ceil(rows * taps * full / 8)]``: its entries ``[rows, taps, full]`` in that order, so
            that the entries of a group follow each other, with the first one of every byte in its lowest bit.
        full: the first columns, which the mask has entries for; all others are kept.

    Returns:
        A contiguous tensor in the shape and dtype of ``weight``.

    Raises:
        TypeError: ``weight`` or ``bits`` is of another dtype.
        ValueError: ``full`` is not from 0 to ``cols``, or ``bits`` has another shape or device.
    """
    check_weight("weight", weight, 3)
    check_ints(full=full)
    rows, cols, taps = weight.shape
    if not 0 <= full <= cols:
        raise ValueError(f"full must be from 0 to the {cols} columns of the weight, got {full}")
    check_like("bits", bits, torch.uint8, ((rows * taps * full + 7) // 8,), weight)
    return _masked_weight(weight, bits, full)
