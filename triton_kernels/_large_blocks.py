"""Top-k of blocks that do not fit the registers: a program reads its block again for every bit of the threshold."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import on

MANTISSA = {torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}


@triton.jit
def _keys(
    from_block,
    start,
    rows,
    cols,
    score_row,
    score_col,
    BLOCK_COLS: tl.constexpr,
    MANTISSA: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Returns the keys of ``CHUNK`` entries, -1 outside the matrix, their rows and columns, and which are inside."""
    entry = start + tl.arange(0, CHUNK)
    row, col = entry // BLOCK_COLS, entry % BLOCK_COLS
    inside = (row < rows) & (col < cols)
    bits = tl.load(from_block + row.to(tl.int64) * score_row + col.to(tl.int64) * score_col, inside, 0).to(tl.int32)
    top: tl.constexpr = 31 if MANTISSA == 23 else 15
    infinity: tl.constexpr = (1 << top) - (1 << MANTISSA)
    key = tl.minimum(bits & ((1 << top) - 1), infinity + 1)
    return tl.where(inside, key, -1), row, col, inside


@triton.jit
def _large_block_topk_mask_kernel(
    score,
    mask,
    k,
    rows,
    cols,
    score_row,
    score_col,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    MANTISSA: tl.constexpr,
    CHUNK: tl.constexpr,
):
    blocks = tl.cdiv(cols, BLOCK_COLS)
    top = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_ROWS
    left = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_COLS
    rows = tl.minimum(rows - top, BLOCK_ROWS).to(tl.int32)
    block_cols = tl.minimum(cols - left, BLOCK_COLS).to(tl.int32)
    size = rows * BLOCK_COLS
    score += top * score_row + left * score_col
    bits: tl.constexpr = 31 if MANTISSA == 23 else 15
    threshold = 0
    for step in range(bits):
        tried = threshold | (1 << (bits - 1)) >> step
        count = tl.zeros([CHUNK], tl.int32)
        for start in range(0, size, CHUNK):
            key, _, _, _ = _keys(score, start, rows, block_cols, score_row, score_col, BLOCK_COLS, MANTISSA, CHUNK)
            count += (key >= tried).to(tl.int32)
        threshold = tl.where(tl.sum(count) >= k, tried, threshold)
    above = tl.zeros([CHUNK], tl.int32)
    for start in range(0, size, CHUNK):
        key, _, _, _ = _keys(score, start, rows, block_cols, score_row, score_col, BLOCK_COLS, MANTISSA, CHUNK)
        above += (key > threshold).to(tl.int32)
    ties = k - tl.sum(above)  # how many of the entries that equal the k-th largest are kept
    for start in range(0, size, CHUNK):
        key, row, col, inside = _keys(score, start, rows, block_cols, score_row, score_col, BLOCK_COLS, MANTISSA, CHUNK)
        tie = (key == threshold).to(tl.int32)
        kept = (key > threshold) | ((tie != 0) & (tl.cumsum(tie, 0) <= ties))
        ties -= tl.sum(tie)
        tl.store(mask + (top + row) * cols + left + col, kept.to(tl.int8), inside)


def large_block_topk_mask(score: Tensor, mask: Tensor, k: int, block_rows: int, block_cols: int) -> None:
    """Writes the top-k mask of blocks of any size into ``mask``."""
    rows, cols = score.shape
    with on(score):
        _large_block_topk_mask_kernel[(triton.cdiv(rows, block_rows) * triton.cdiv(cols, block_cols),)](
            score.view(torch.int32 if score.element_size() == 4 else torch.int16),
            mask.view(torch.int8),
            k,
            rows,
            cols,
            *score.stride(),
            BLOCK_ROWS=block_rows,
            BLOCK_COLS=block_cols,
            MANTISSA=MANTISSA[score.dtype],
            CHUNK=4096,
            num_warps=8,
        )
