"""Scores and top-k masks of the blocks of a matrix; a program takes several blocks that lie side by side."""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._large_blocks import large_block_topk_mask
from ._launch import Config, Table, on
from ._planes import keep_topk, key_planes, pack_words
from ._select import widen
from ._strips import place, plan_strips, store_mask, warp_lanes

# A thread takes 16 bytes of a row at a time. Programs of few warps are small, so the last ones end soon.
SCORES = Table("block_scores", {f"{warps}-warps": {"num_warps": warps} for warps in (1, 2, 4)}, {"any": "2-warps"})
TOPK = Table("block_topk_mask", {f"{warps}-warps": {"num_warps": warps} for warps in (1, 2, 4)}, {"any": "1-warps"})
LIMIT = 16384  # columns of a block whose sums fit the registers


@triton.jit
def sum_columns(total):
    """Sums ``[BLOCKS, COLS]`` to ``[BLOCKS, 1]``: adds the second half of the columns to the first, down to one."""
    blocks: tl.constexpr = total.shape[0]
    cols: tl.constexpr = total.shape[1]
    for stage in tl.static_range(1, 16):
        if cols >> stage > 0:
            total = tl.sum(tl.reshape(total, [blocks, 2, cols >> stage]), 1)
    return total


@triton.jit
def _block_scores_kernel(
    weight,
    scale,
    mask,
    scores,
    rows,
    cols,
    weight_row,
    weight_col,
    mask_row,
    mask_col,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    UNROLLED: tl.constexpr,
    COLS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    count = tl.cdiv(cols, BLOCK_COLS)
    strips = tl.cdiv(count, BLOCKS)
    block_row = (tl.program_id(0) // strips).to(tl.int64)
    block = tl.program_id(0) % strips * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    entry = tl.arange(0, COLS)[None, :]
    col = block * BLOCK_COLS + entry  # [BLOCKS, COLS]
    inside = col < cols
    if COLS != BLOCK_COLS:
        inside = inside & (entry < BLOCK_COLS)
    if scale is not None:
        factor = tl.load(scale + col, inside, 0)
    total = tl.full([BLOCKS, COLS], -0.0, tl.float32)  # adding -0.0 changes no number, not even its sign
    for first in range(0, BLOCK_ROWS, UNROLLED):
        for below in tl.static_range(UNROLLED):
            row = block_row * BLOCK_ROWS + first + below
            counts = inside & (row < rows)
            x = tl.abs(widen(tl.load(weight + row * weight_row + col.to(tl.int64) * weight_col, counts, 0)))
            if scale is not None:
                x = x * factor
            if mask is not None:
                counts = counts & (tl.load(mask + row * mask_row + col.to(tl.int64) * mask_col, counts, 0) != 0)
            if scale is not None or mask is not None:
                x = tl.where(counts, x, 0.0)
            total = total + x
    tl.store(scores + block_row * count + block, sum_columns(total), block < count)


@triton.jit
def _block_topk_mask_kernel(
    score,
    mask,
    k,
    rows,
    cols,
    score_row,
    score_col,
    strip,
):
    row, col, inside = place(rows, cols, strip, 16)
    entries = tl.load(score + row * score_row + col.to(tl.int64) * score_col, inside, 0)
    kept = keep_topk(key_planes(entries), pack_words(inside), k)
    store_mask(kept, mask, rows, cols, strip)


def block_scores(weight: Tensor, block_rows: int, block_cols: int, scale: Tensor | None, mask: Tensor | None) -> Tensor:
    rows, cols = weight.shape
    count = -(-rows // block_rows), -(-cols // block_cols)
    scores = weight.new_empty(count, dtype=torch.float32)
    if scores.numel() == 0:
        return scores
    if block_cols > LIMIT:
        return _halve_columns(block_scores(weight, block_rows, 1, scale, mask), block_cols)
    config: Config = SCORES.config(weight, "any")
    padded = triton.next_power_of_2(block_cols)
    warps = max(config["num_warps"], min(8, padded // 512))
    blocks = min(
        max(1, 16 // weight.element_size() * warp_lanes(weight) * warps // padded), triton.next_power_of_2(count[1])
    )
    with on(weight):
        _block_scores_kernel[(count[0] * triton.cdiv(count[1], blocks),)](
            weight,
            scale,
            None if mask is None else mask.view(torch.int8),
            scores,
            rows,
            cols,
            *weight.stride(),
            *((0, 0) if mask is None else mask.stride()),
            BLOCK_ROWS=block_rows,
            BLOCK_COLS=block_cols,
            UNROLLED=block_rows if block_rows <= 32 else math.gcd(block_rows, 16),
            COLS=padded,
            BLOCKS=blocks,
            num_warps=warps,
            enable_fp_fusion=False,
        )
    return scores


def _halve_columns(total: Tensor, block_cols: int) -> Tensor:
    """Sums over the columns of blocks that are too wide for the registers, in the same order as the kernel."""
    total = F.pad(total, (0, -total.shape[1] % block_cols)).unflatten(1, (-1, block_cols))
    width = triton.next_power_of_2(block_cols)
    total = F.pad(total, (0, width - block_cols))
    while width > 1:
        width //= 2
        total = total[..., :width] + total[..., width:]
    return total.squeeze(-1)


def block_topk_mask(score: Tensor, k: int, block_rows: int, block_cols: int) -> Tensor:
    rows, cols = score.shape
    mask = score.new_empty((rows, cols), dtype=torch.bool)
    if score.numel() == 0:
        return mask
    launch = plan_strips(score, block_rows, block_cols, 2, score.element_size(), TOPK.config(score, "any"))
    if launch is None:
        large_block_topk_mask(score, mask, k, block_rows, block_cols)
        return mask
    grid, strip, warps = launch
    quads = (cols | block_cols | strip.width.value) % 4 == 0
    with on(score):
        _block_topk_mask_kernel[(grid,)](
            score,
            mask.view(torch.int32 if quads else torch.int8),
            k,
            rows,
            cols,
            *score.stride(),
            strip,
            num_warps=warps,
        )
    return mask
