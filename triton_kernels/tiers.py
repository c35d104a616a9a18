"""Prunes every block by its tier and scores what is left, in one pass over the weight (see ``_planes``)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Table, on
from ._planes import has, keep24, keep_topk, key_planes
from ._strips import MANTISSA, as_bits, first_entry, inside, load_slices, place, program, store_mask, valid_words
from ._tiles import pairs, unpairs
from .blocks import block_scores, block_topk_mask, sum_columns
from .nm import nm_mask

TIERS = Table("tier_prune", {f"{warps}-warps": {"num_warps": warps} for warps in (1, 2, 4)}, {"any": "1-warps"})


@triton.jit
def _magnitude(bits, factor, MANTISSA: tl.constexpr):
    """fp32 magnitude, times its factor, of a float given by its bits, uint32."""
    if MANTISSA == 23:
        x = bits.to(tl.float32, bitcast=True)
    elif MANTISSA == 7:
        x = (bits << 16).to(tl.float32, bitcast=True)
    else:
        x = bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    x = tl.abs(x)
    if factor is not None:
        x = x * factor
    return x


@triton.jit
def _load_factors(scale, left, cols, BLOCK_COLS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr):
    """The factors of the even and of the odd columns, for each slice of a row."""
    evens, odds = (), ()
    for s in tl.static_range(COLS // WIDTH if COLS > WIDTH else 1):
        if scale is None:
            even, odd = None, None
        else:
            _, col = place(s, COLS, WIDTH)
            even, odd = unpairs(tl.load(scale + left + col, (col < BLOCK_COLS) & (left + col < cols), 0))
        evens += (even,)
        odds += (odd,)
    return evens, odds


@triton.jit
def _scaled_planes(even, odd, even_factors, odd_factors, SEGMENTS: tl.constexpr, MANTISSA: tl.constexpr):
    evens, odds = (), ()
    for s in tl.static_range(16):
        evens += (_magnitude(even[s], even_factors[s % SEGMENTS], MANTISSA).to(tl.uint32, bitcast=True),)
        odds += (_magnitude(odd[s], odd_factors[s % SEGMENTS], MANTISSA).to(tl.uint32, bitcast=True),)
    return key_planes(evens, odds, 23)


@triton.jit
def _store_pruned(
    even,
    odd,
    kept,
    pruned,
    top,
    left,
    rows,
    cols,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    COLS: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    WHOLE: tl.constexpr,
):
    for s in tl.static_range(16):
        row, col = place(s, COLS // UNIT, WIDTH // UNIT)
        if UNIT == 2:
            entries = ((even[s] | odd[s] << 16) & (kept >> s & 0x00010001) * 0xFFFF).to(tl.int32)
        else:
            even_kept, odd_kept = has(kept, s)
            entries = pairs(tl.where(even_kept, even[s], 0), tl.where(odd_kept, odd[s], 0))
            entries = entries.to(pruned.dtype.element_ty)
        at = pruned + (top + row) * (cols // UNIT) + left // UNIT + col
        if WHOLE:
            tl.store(at, entries)
        else:
            tl.store(at, entries, inside(row, col, top, left, rows, cols, BLOCK_ROWS, BLOCK_COLS, UNIT))


@triton.jit
def _sum_blocks(
    even, odd, kept, even_factors, odd_factors, ROWS: tl.constexpr, SEGMENTS: tl.constexpr, MANTISSA: tl.constexpr
):
    """``block_scores`` of what is kept: rows one after the other, then columns by halves; ``[BLOCKS, 1]``."""
    totals = ()
    for segment in tl.static_range(SEGMENTS):
        even_total = tl.zeros_like(kept).to(tl.float32) - 0.0
        odd_total = even_total
        for s in tl.static_range(segment, ROWS * SEGMENTS, SEGMENTS):
            even_kept, odd_kept = has(kept, s)
            even_total += tl.where(even_kept, _magnitude(even[s], even_factors[segment], MANTISSA), 0.0)
            odd_total += tl.where(odd_kept, _magnitude(odd[s], odd_factors[segment], MANTISSA), 0.0)
        totals += (pairs(even_total, odd_total),)
    for stage in tl.static_range(1, 5):
        if SEGMENTS >> stage > 0:
            halves = ()
            for segment in tl.static_range(SEGMENTS >> stage):
                halves += (totals[segment] + totals[segment + (SEGMENTS >> stage)],)
            totals = halves
    return sum_columns(totals[0])


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
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    COLS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    WHOLE: tl.constexpr,
    MANTISSA: tl.constexpr,
    READ: tl.constexpr,
    WRITTEN: tl.constexpr,
):
    top, left = first_entry(cols, BLOCK_ROWS, BLOCK_COLS, BLOCKS)
    even, odd = load_slices(
        weight, top, left, rows, cols, weight_row, weight_col, BLOCK_ROWS, BLOCK_COLS, COLS, WIDTH, READ, WHOLE
    )
    count = tl.cdiv(cols, BLOCK_COLS)
    block_row, block = top // BLOCK_ROWS, left // BLOCK_COLS
    tier = tl.load(tiers + block_row * tiers_row + block.to(tl.int64) * tiers_col, block < count, 0).to(tl.int32)
    segments: tl.constexpr = COLS // WIDTH if COLS > WIDTH else 1  # slices of one row
    bits: tl.constexpr = 15 if scale is None and MANTISSA != 23 else 31
    if scale is None:
        keys = key_planes(even, odd, MANTISSA)
    else:
        even_factors, odd_factors = _load_factors(scale, left, cols, BLOCK_COLS, COLS, WIDTH)
        keys = _scaled_planes(even, odd, even_factors, odd_factors, segments, MANTISSA)
    valid = valid_words(top, left, rows, cols, BLOCK_ROWS, BLOCK_COLS, COLS, WIDTH, WHOLE)
    kept = keep24(keys, bits)
    if not WHOLE:  # a tail shorter than four is kept
        kept |= valid_words(top, left, rows, cols // 4 * 4, BLOCK_ROWS, BLOCK_COLS, COLS, WIDTH, WHOLE) ^ 0xFFFFFFFF
    if tl.max(tier) > 1:
        kept = tl.where(tier == 1, kept, keep_topk(keys, valid, k, bits))
    kept = tl.where(tier == 0, valid, kept & valid)
    store_mask(kept, mask, top, left, rows, cols, BLOCK_ROWS, BLOCK_COLS, COLS, WIDTH, WRITTEN, WHOLE)
    _store_pruned(even, odd, kept, pruned, top, left, rows, cols, BLOCK_ROWS, BLOCK_COLS, COLS, WIDTH, READ, WHOLE)
    if WIDTH <= COLS:
        even_factors, odd_factors = _load_factors(score_scale, left, cols, BLOCK_COLS, COLS, WIDTH)
        total = _sum_blocks(even, odd, kept, even_factors, odd_factors, BLOCK_ROWS, segments, MANTISSA)
        tl.store(scores + block_row * count + block, total, block < count)


def tier_prune(
    weight: Tensor,
    tiers: Tensor,
    k: int,
    block_rows: int,
    block_cols: int,
    scale: Tensor | None,
    score_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols = weight.shape
    pruned, mask = weight.new_empty((rows, cols)), weight.new_empty((rows, cols), dtype=torch.bool)
    scores = weight.new_empty(tiers.shape, dtype=torch.float32)
    if weight.numel() == 0:
        return pruned, mask, scores
    key_bytes = weight.element_size() if scale is None else 4
    launch = program(weight, block_rows, block_cols, 4, key_bytes, TIERS.config(weight, "any"))
    if launch is None:
        return _prune_in_passes(weight, tiers, k, block_rows, block_cols, scale, score_scale)
    grid, constants = launch
    bits, read = as_bits(weight, block_cols)
    written = 4 if cols % 4 == 0 else 1
    with on(weight):
        _tier_prune_kernel[(grid,)](
            bits,
            tiers,
            scale,
            score_scale,
            pruned.view(bits.dtype),
            mask.view(torch.int32 if written == 4 else torch.int8),
            scores,
            k,
            rows,
            cols,
            *bits.stride(),
            *tiers.stride(),
            MANTISSA=MANTISSA[weight.dtype],
            READ=read,
            WRITTEN=written,
            enable_fp_fusion=False,
            **constants,
        )
    if constants["WIDTH"] > constants["COLS"]:  # the rows of a column lie in several threads, and add in order
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks that are larger than the registers."""
    rows, cols = weight.shape
    score = weight if scale is None else weight.abs().float() * scale
    tier = tiers.repeat_interleave(block_rows, 0)[:rows].repeat_interleave(block_cols, 1)[:, :cols]
    mask = torch.where(tier == 1, nm_mask(score, 2, 4), block_topk_mask(score, k, block_rows, block_cols))
    mask |= tier == 0
    return torch.where(mask, weight, 0), mask, block_scores(weight, block_rows, block_cols, score_scale, mask)
