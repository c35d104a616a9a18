"""Masks that are 2:4 along rows and along columns: the best pattern of every 4x4 tile."""

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _select
from ._launch import Table, on
from ._nm24 import halve_warps_on_amd
from ._pattern4x4 import best_pattern, magnitudes
from .nm import nm_mask

TABLE = Table(
    "transposable",
    {
        "512x2": {"COLS": 512, "num_warps": 2},
        "1024x4": {"COLS": 1024, "num_warps": 4},
        "512x4": {"COLS": 512, "num_warps": 4},
    },
    default={"any": "1024x4"},
)


@triton.jit
def _row(x_ptr, inside):
    """Loads the magnitudes of one row of the tiles, as four columns."""
    return _select.split4(magnitudes(tl.load(x_ptr, mask=inside, other=0.0)))


@triton.jit(do_not_specialize=["units"])
def _transposable_kernel(x_ptr, mask_ptr, units, UNIT: tl.constexpr, COLS: tl.constexpr):
    """Writes the masks of ``COLS / 4`` tiles side by side; the matrix has ``units * UNIT`` columns."""
    cols = units * UNIT
    whole = cols // 4 * 4
    blocks = tl.cdiv(whole, COLS)
    col0 = tl.program_id(0) % blocks * COLS
    start = (tl.program_id(0) // blocks).to(tl.int64) * 4 * cols + col0
    col = tl.arange(0, COLS)
    inside = col < whole - col0
    x_ptr += start + col
    kept = best_pattern(
        _row(x_ptr, inside),
        _row(x_ptr + cols, inside),
        _row(x_ptr + 2 * cols, inside),
        _row(x_ptr + 3 * cols, inside),
    )
    for row in tl.static_range(4):
        bits = kept >> (4 * row)
        if UNIT % 4 == 0:  # four bytes are stored as one word
            word = ((bits & 15) * 0x00204081) & 0x01010101
            words = mask_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + (start + row * cols) // 4
            tile = tl.arange(0, COLS // 4)
            tl.store(words + tile, word, mask=tile < (whole - col0) // 4)
        else:
            mask = _select.join4(bits & 1, (bits >> 1) & 1, (bits >> 2) & 1, (bits >> 3) & 1)
            tl.store(mask_ptr + start + row * cols + col, mask != 0, mask=inside)


def transposable_mask24(score: Tensor) -> Tensor:
    mask = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    score = score.contiguous()
    rows, cols = (size // 4 * 4 for size in score.shape)
    if rows < score.shape[0] or cols < score.shape[1]:
        mask[rows:, :cols] = nm_mask(score[rows:, :cols], 2, 4)
        mask[:rows, cols:] = nm_mask(score[:rows, cols:].t(), 2, 4).t()
        mask[rows:, cols:] = True
    if rows * cols == 0:
        return mask
    config = halve_warps_on_amd(TABLE.config(score, "any"), score)
    config["COLS"] = min(triton.next_power_of_2(cols), config["COLS"])
    unit = gcd(score.shape[1], 32)
    grid = (rows // 4 * triton.cdiv(cols, config["COLS"]),)
    with on(score):
        _transposable_kernel[grid](score, mask, score.shape[1] // unit, UNIT=unit, enable_fp_fusion=False, **config)
    return mask
