"""Unpacking of a tiered weight to a dense one, for token counts that cuBLAS multiplies faster."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import on, processors
from ._tiered_columns import Packed, counts, list_columns, load_tiers, scan_size
from ._tiles import join_groups


@triton.jit
def _place(unit, first_row, columns, rows, cols, inside, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Returns where the eight columns of each unit go in the weight, and which of them exist: ``[units, 8]`` each."""
    units: tl.constexpr = BLOCK_COLS // 8
    row = unit // units % BLOCK_ROWS
    col = tl.load(columns + unit // (BLOCK_ROWS * units), inside, 0) * BLOCK_COLS + unit % units * 8
    col = col[:, None] + tl.arange(0, 8)[None, :]
    return row.to(tl.int64)[:, None] * cols + col, (inside & (first_row + row < rows))[:, None] & (col < cols)


@triton.jit
def _unpack_tiered_kernel(
    packed,
    columns,
    weight,
    rows,
    cols,
    across,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    K: tl.constexpr,
    SCAN: tl.constexpr,
    UNITS: tl.constexpr,
):
    block_units: tl.constexpr = BLOCK_ROWS * BLOCK_COLS // 8
    block_row, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    tiers, dense, values, bitmask, topk, positions, starts = packed
    dense_from, from24, topk_from, dense_count, count24, topk_count = counts(starts, block_row)
    columns += block_row.to(tl.int64) * across
    tiers += block_row.to(tl.int64) * across
    list_columns(tiers, load_tiers(tiers, 0, across, SCAN), columns, across, dense_count, count24, SCAN)
    first_row = block_row * BLOCK_ROWS
    weight += first_row.to(tl.int64) * cols
    unit, eight = tl.arange(0, UNITS), tl.arange(0, 8)[None, :]

    end = dense_count * block_units
    for start in range(split * UNITS, end, splits * UNITS):
        at, keep = _place(start + unit, first_row, columns, rows, cols, start + unit < end, BLOCK_ROWS, BLOCK_COLS)
        entry = 8 * (dense_from * block_units + start + unit)[:, None] + eight
        tl.store(weight + at, tl.load(dense + entry, (start + unit < end)[:, None], 0), keep)

    end = count24 * block_units
    for start in range(split * UNITS, end, splits * UNITS):
        byte, inside = from24 * block_units + start + unit, start + unit < end
        at, keep = _place(start + unit, first_row, columns + dense_count, rows, cols, inside, BLOCK_ROWS, BLOCK_COLS)
        kept = tl.load(values + 4 * byte[:, None] + tl.arange(0, 4)[None, :], inside[:, None], 0)
        lower, upper = tl.split(tl.reshape(kept, UNITS, 2, 2))
        bits = tl.load(bitmask + byte, inside, 0).to(tl.int32)[:, None] >> 4 * tl.arange(0, 2)[None, :]
        bit0, bit1, bit2, bit3 = (bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0, (bits & 8) != 0
        zero = tl.zeros_like(lower)
        tile = join_groups(
            tl.where(bit0, lower, zero),
            tl.where(bit1, tl.where(bit0, upper, lower), zero),
            tl.where(bit2, tl.where(bit3, lower, upper), zero),
            tl.where(bit3, upper, zero),
        )
        tl.store(weight + at, tile, keep)

    each = tl.cdiv(topk_count, splits)  # top-k blocks of this program, which writes their zeros and then their entries
    first, columns = split * each, columns + dense_count + count24
    last = tl.minimum(first + each, topk_count)
    for start in range(first * block_units, last * block_units, UNITS):
        inside = start + unit < last * block_units
        at, keep = _place(start + unit, first_row, columns, rows, cols, inside, BLOCK_ROWS, BLOCK_COLS)
        tl.store(weight + at, tl.zeros((UNITS, 8), weight.dtype.element_ty), keep)
    tl.debug_barrier()
    if K > 0:
        for start in range(first * K, last * K, UNITS):
            entry = start + unit
            inside = entry < last * K
            kept = tl.load(topk + topk_from * K + entry, inside, 0)
            position = tl.load(positions + topk_from * K + entry, inside, 0).to(tl.int32)
            row = position // BLOCK_COLS
            col = tl.load(columns + entry // K, inside, 0) * BLOCK_COLS + position % BLOCK_COLS
            stored = inside & ((position != 0) | (entry % K == 0))  # the rest is padding
            tl.store(weight + row.to(tl.int64) * cols + col, kept, stored & (first_row + row < rows) & (col < cols))


def unpack_tiered(packed: Packed, rows: int, cols: int) -> Tensor:
    """Returns the dense weight ``[rows, cols]``."""
    weight = packed.dense.new_empty(rows, cols)
    if weight.numel() == 0:
        return weight
    (down, across), (block_rows, block_cols) = packed.blocks, packed.block
    splits = min(triton.cdiv(8 * processors(weight), down), triton.cdiv(across, 16))
    with on(weight):
        _unpack_tiered_kernel[(down, splits)](
            packed,
            torch.empty(packed.blocks, dtype=torch.int32, device=weight.device),
            weight,
            rows,
            cols,
            across,
            BLOCK_ROWS=block_rows,
            BLOCK_COLS=block_cols,
            K=packed.k,
            SCAN=scan_size(across),
            UNITS=256,
            num_warps=8,
        )
    return weight
