"""Prunes every block by its tier and scores what it keeps, in one pass over the weight (see ``_planes``)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Table, on
from ._planes import keep24, keep_topk, key_planes, nonzero, pack_words, slices, unpack_words
from ._select import widen
from ._strips import blocks_of, place, plan_strips, store_mask
from .blocks import block_scores, block_topk_mask, sum_columns
from .nm import nm_mask

TIERS = Table("tier_prune", {f"{warps}-warps": {"num_warps": warps} for warps in (1, 2, 4)}, {"any": "1-warps"})


@triton.jit
def magnitudes(entries, scale, rows, cols, strip):
    """Returns fp32 magnitudes ``[16, BLOCKS, WIDTH]``, times the ``scale`` of their columns unless it is None."""
    x = tl.abs(widen(entries))
    if scale is not None:
        segments: tl.constexpr = row_slices(strip)
        _, col, inside = place(rows, cols, strip, segments)  # of one row, as all rows have the same factors
        factors = tl.load(scale + col, inside, 0)
        x = tl.reshape(x, [16 // segments, segments, x.shape[1], x.shape[2]]) * factors[None, :, :, :]
        x = tl.reshape(x, [16, strip.blocks, strip.width])
    return x


@triton.constexpr_function
def row_slices(strip):
    """Returns how many slices make a row of a block; 1 where a slice has several rows."""
    return max(strip.cols // strip.width, 1)


@triton.jit
def ranking_keys(entries, scale, rows, cols, strip):
    """Returns the key planes of the entries' magnitudes times ``scale``, by which they are ranked."""
    if scale is None:
        keys = key_planes(entries)
    else:
        keys = key_planes(magnitudes(entries, scale, rows, cols, strip))
    return keys


@triton.jit
def keep_floats(x, keep):
    """Returns the floats that are kept, and zeros elsewhere."""
    bits: tl.constexpr = tl.int32 if x.dtype == tl.float32 else tl.int16
    return (x.to(bits, bitcast=True) & keep.to(bits)).to(x.dtype, bitcast=True)


@triton.jit
def sum_blocks(x, strip):
    """Sums magnitudes per block, in the order of ``block_scores``: first rows, then columns; ``[1, BLOCKS, 1]``."""
    segments: tl.constexpr = row_slices(strip)
    blocks: tl.constexpr = x.shape[1]
    rows = tl.permute(tl.reshape(x, [16 // segments, segments, blocks, x.shape[2]]), 0, 2, 1, 3)
    rows = slices(tl.reshape(rows, [16 // segments, blocks, segments * x.shape[2]]))
    total = rows[0]
    for row in tl.static_range(1, strip.block_rows):
        total = total + rows[row]
    return tl.reshape(sum_columns(tl.reshape(total, [blocks, segments * x.shape[2]])), [1, blocks, 1])


@triton.jit
def _tier_prune_kernel(
    weight,
    tiers,
    scale,
    score_scale,
    pruned,
    mask,
    scores,
    k,
    rows,
    cols,
    weight_row,
    weight_col,
    tiers_row,
    tiers_col,
    strip,
    NESTED: tl.constexpr,
):
    row, col, inside = place(rows, cols, strip, 16)
    at = weight + row * weight_row + col.to(tl.int64) * weight_col
    entries = tl.load(at, inside, 0)
    block_row, block = blocks_of(cols, strip)
    count = tl.cdiv(cols, strip.block_cols)
    tier = tl.load(tiers + block_row * tiers_row + block.to(tl.int64) * tiers_col, block < count, 0).to(tl.int32)
    keys = ranking_keys(entries, scale, rows, cols, strip)
    valid = pack_words(inside)
    kept = keep24(keys)
    if not strip.whole:  # a tail shorter than four is kept
        kept |= pack_words(col >= cols // 4 * 4)
    kept &= valid
    if NESTED:
        topk = keep_topk(keys, kept & nonzero(keys), k)
    else:
        topk = keep_topk(keys, valid, k)
    kept = tl.where(tier == 0, valid, tl.where(tier > 1, topk, kept))
    store_mask(kept, mask, rows, cols, strip)
    keep = unpack_words(kept)
    entries = tl.load(at, inside, 0)  # again, from the cache: to hold them would take too many registers
    tl.store(pruned + row * cols + col, keep_floats(entries, keep), inside)
    if strip.width <= strip.cols:
        x = magnitudes(entries, score_scale, rows, cols, strip)
        total = sum_blocks(keep_floats(x, keep), strip)
        tl.store(scores + block_row * count + block, total, block < count)


def tier_prune(
    weight: Tensor,
    tiers: Tensor,
    k: int,
    block_rows: int,
    block_cols: int,
    scale: Tensor | None,
    score_scale: Tensor | None,
    nested: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols = weight.shape
    pruned, mask = weight.new_empty((rows, cols)), weight.new_empty((rows, cols), dtype=torch.bool)
    scores = weight.new_empty(tiers.shape, dtype=torch.float32)
    if weight.numel() == 0:
        return pruned, mask, scores
    key_bytes = weight.element_size() if scale is None else 4
    launch = plan_strips(weight, block_rows, block_cols, 4, key_bytes, TIERS.config(weight, "any"))
    if launch is None:
        return _prune_in_passes(weight, tiers, k, block_rows, block_cols, scale, score_scale, nested)
    grid, strip, warps = launch
    with on(weight):
        _tier_prune_kernel[(grid,)](
            weight,
            tiers,
            scale,
            score_scale,
            pruned,
            mask.view(torch.int32 if cols % 4 == 0 else torch.int8),
            scores,
            k,
            rows,
            cols,
            *weight.stride(),
            *tiers.stride(),
            strip,
            NESTED=nested,
            num_warps=warps,
            enable_fp_fusion=False,
        )
    if strip.width.value > strip.cols.value:  # the rows of a column are in several threads, but add in order
        scores = block_scores(weight, block_rows, block_cols, score_scale, mask)
    return pruned, mask, scores


def _prune_in_passes(
    weight: Tensor,
    tiers: Tensor,
    k: int,
    block_rows: int,
    block_cols: int,
    scale: Tensor | None,
    score_scale: Tensor | None,
    nested: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Prunes and scores blocks that do not fit the registers, in several passes."""
    rows, cols = weight.shape
    score = weight if scale is None else weight.abs().float() * scale
    tier = tiers.repeat_interleave(block_rows, 0)[:rows].repeat_interleave(block_cols, 1)[:, :cols]
    sparse24 = nm_mask(score, 2, 4)
    score = torch.where(sparse24, score, 0) if nested else score
    topk = block_topk_mask(score, k, block_rows, block_cols)
    topk = topk & (score != 0) if nested else topk
    mask = torch.where(tier == 1, sparse24, topk) | (tier == 0)
    return torch.where(mask, weight, 0), mask, block_scores(weight, block_rows, block_cols, score_scale, mask)
