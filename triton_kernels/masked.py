"""A weight with zeros where a mask, given as bits, drops entries."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import on

BLOCK = 2048


@triton.jit
def _masked_kernel(weight_ptr, bits_ptr, masked_ptr, count, cols, taps, full, TAPS: tl.constexpr, BLOCK: tl.constexpr):
    """Writes BLOCK entries; without TAPS there is one tap, and the mask has an entry for every column."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    eight = first // 8 + tl.arange(0, BLOCK // 8)[:, None]
    lane = tl.arange(0, 8)[None, :]
    index = eight * 8 + lane
    inside = index < count
    if TAPS:
        row, col, tap = index // (cols * taps), index // taps % cols, index % taps
        bit, has_bit = (row * taps + tap) * full + col, inside & (col < full)
        byte = tl.load(bits_ptr + bit // 8, mask=has_bit, other=255).to(tl.int32)
        kept = (byte >> (bit % 8).to(tl.int32)) & 1
    else:
        byte = tl.load(bits_ptr + eight, mask=eight * 8 < count, other=0).to(tl.int32)
        kept = (byte >> lane) & 1
    weight = tl.load(weight_ptr + index, mask=inside, other=0.0)
    tl.store(masked_ptr + index, tl.where(kept != 0, weight, 0.0).to(weight.dtype), mask=inside)


def masked_weight(weight: Tensor, bits: Tensor, full: int) -> Tensor:
    weight, bits = weight.contiguous(), bits.contiguous()
    masked = torch.empty_like(weight)
    _, cols, taps = weight.shape
    if count := weight.numel():
        with on(weight):
            _masked_kernel[(triton.cdiv(count, BLOCK),)](
                weight, bits, masked, count, cols, taps, full, TAPS=taps > 1 or full < cols, BLOCK=BLOCK, num_warps=4
            )
    return masked
