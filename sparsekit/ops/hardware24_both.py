"""Packs a weight that is 2:4 along rows and columns, and its transpose, into a hardware layout."""

import torch
from torch import Tensor

from ._define import define
from .hardware24 import check_16bit, check_shape, empty_packed, hardware_multiple, to_hardware24_reference
from .sparse24 import pack24_reference
from .transposable import transposable_mask24_reference


def prune_both_to_hardware24_reference(weight: Tensor, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    mask = transposable_mask24_reference(weight)
    values, bitmask = pack24_reference(weight, mask, False)
    values_t, bitmask_t = pack24_reference(weight.t(), mask.t(), False)
    packed = to_hardware24_reference(values, bitmask, weight.shape[1], layout)
    return packed, to_hardware24_reference(values_t, bitmask_t, weight.shape[0], layout), bitmask


def _fake(weight: Tensor, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols = weight.shape
    bitmask = weight.new_empty(rows, cols // 8, dtype=torch.uint8)
    return empty_packed(weight, rows, cols), empty_packed(weight, rows, cols), bitmask


_prune_both_to_hardware24 = define(prune_both_to_hardware24_reference, _fake, compiled=False)


@torch.no_grad()
def prune_both_to_hardware24(weight: Tensor, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    """Prunes a weight to 2:4 along rows and columns at once and packs it and its transpose, reading it once.

    A training step multiplies by ``W`` forward and by ``W.T`` backward; with the mask of ``transposable_mask24`` both
    products are sparse.

    Args:
        weight: ``[rows, cols]``, float16 or bfloat16, any strides. Outside autograd.
        layout: a layout of ``to_hardware24``; rows and columns must both be multiples of the larger number of
            ``hardware_multiple(layout)``.

    Returns:
        ``(packed, packed_t, bitmask)``: ``weight`` and ``weight.T`` in the layout, and the bits of the mask, uint8
        ``[rows, cols / 8]``.

    Raises:
        TypeError: a wrong dtype.
        ValueError: an unknown layout, or a shape that does not belong to it.
    """
    check_16bit("weight", weight, 2)
    both = max(hardware_multiple(layout))
    check_shape(weight.shape, (both, both), layout)
    return _prune_both_to_hardware24(weight, layout)
