"""Scores of what every block would keep in each tier, in one pass over the weight (see ``_planes``)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Table, on
from ._planes import keep24, keep_topk, pack_words, unpack_words
from ._strips import blocks_of, place, plan_strips
from .blocks import block_scores, block_topk_mask
from .nm import nm_mask
from .tiers import keep_floats, magnitudes, ranking_keys, sum_blocks

SCORES = Table("tier_scores", {f"{warps}-warps": {"num_warps": warps} for warps in (1, 2, 4)}, {"any": "1-warps"})


@triton.jit
def _tier_scores_kernel(
    weight,
    scale,
    score_scale,
    scores,
    k,
    rows,
    cols,
    weight_row,
    weight_col,
    strip,
    TOPK: tl.constexpr,
    SQUARED: tl.constexpr,
):
    row, col, inside = place(rows, cols, strip, 16)
    at = weight + row * weight_row + col.to(tl.int64) * weight_col
    entries = tl.load(at, inside, 0)
    keys = ranking_keys(entries, scale, rows, cols, strip)
    valid = pack_words(inside)
    sparse24 = keep24(keys)
    if not strip.whole:  # a tail shorter than four is kept
        sparse24 |= pack_words(col >= cols // 4 * 4)
    topk = keep_topk(keys, valid, k) if TOPK else tl.zeros_like(valid)
    entries = tl.load(at, inside, 0)  # again, from the cache: to hold them would take too many registers
    x = magnitudes(entries, score_scale, rows, cols, strip)
    if SQUARED:
        x = x * x
    block_row, block = blocks_of(cols, strip)
    count = tl.cdiv(cols, strip.block_cols)
    for tier in tl.static_range(3):
        kept = (valid, sparse24 & valid, topk)[tier]
        total = sum_blocks(keep_floats(x, unpack_words(kept)), strip)
        tl.store(scores + (tl.cdiv(rows, strip.block_rows) * tier + block_row) * count + block, total, block < count)


def tier_scores(
    weight: Tensor,
    k: int,
    block_rows: int,
    block_cols: int,
    scale: Tensor | None,
    score_scale: Tensor | None,
    squared: bool,
) -> Tensor:
    rows, cols = weight.shape
    count = triton.cdiv(rows, block_rows), triton.cdiv(cols, block_cols)
    scores = weight.new_empty((3, *count), dtype=torch.float32)
    if weight.numel() == 0:
        return scores
    key_bytes = weight.element_size() if scale is None else 4
    launch = plan_strips(weight, block_rows, block_cols, 4, key_bytes, SCORES.config(weight, "any"))
    # A slice wider than a block holds several rows, which the kernel could not add one after the other.
    if launch is None or launch[1].width.value > launch[1].cols.value:
        return _score_in_passes(weight, k, block_rows, block_cols, scale, score_scale, squared)
    grid, strip, warps = launch
    with on(weight):
        _tier_scores_kernel[(grid,)](
            weight,
            scale,
            score_scale,
            scores,
            k,
            rows,
            cols,
            *weight.stride(),
            strip,
            TOPK=k > 0,
            SQUARED=squared,
            num_warps=warps,
            enable_fp_fusion=False,
        )
    return scores


def _score_in_passes(
    weight: Tensor,
    k: int,
    block_rows: int,
    block_cols: int,
    scale: Tensor | None,
    score_scale: Tensor | None,
    squared: bool,
) -> Tensor:
    """Scores blocks that do not fit the registers, or whose slices hold several rows, in one pass per tier."""
    ranked = weight if scale is None else weight.abs().float() * scale
    if squared:
        score = weight.abs().float() if score_scale is None else weight.abs().float() * score_scale
        weight, score_scale = score.square(), None
    masks = None, nm_mask(ranked, 2, 4), block_topk_mask(ranked, k, block_rows, block_cols)
    return torch.stack([block_scores(weight, block_rows, block_cols, score_scale, mask) for mask in masks])
