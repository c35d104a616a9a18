"""``linear_tiered`` of fp32, without tensor cores, which would round the inputs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tiered_columns import Packed, counts, list_columns, load_tiers, scan_size


@triton.jit
def _fours(tile):
    """Splits ``[a, b, 4]`` into four ``[a, b]``; no data moves between threads."""
    even, odd = tl.split(tl.reshape(tile, tile.shape[0], tile.shape[1], 2, 2))
    entry0, entry2 = tl.split(even)
    entry1, entry3 = tl.split(odd)
    return entry0, entry1, entry2, entry3


@triton.jit
def _four_inputs(x_at, column, inside, cols):
    """Loads four neighboring inputs of every token and unit: ``[tokens, units]`` each."""
    column = column[None, :, None] + tl.arange(0, 4)[None, None, :]
    return _fours(tl.load(x_at[:, :, None] + column, inside[:, :, None] & (column < cols), 0))


@triton.jit
def _linear_tiered_fp32_kernel(
    x,
    packed,
    columns,
    bias,
    y,
    tokens,
    rows,
    cols,
    across,
    x_row,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    K: tl.constexpr,
    SCAN: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    strips: tl.constexpr = (BLOCK_ROWS + ROWS - 1) // ROWS
    units: tl.constexpr = BLOCK_COLS // 8
    block_row, first_row = tl.program_id(0) // strips, tl.program_id(0) % strips * ROWS
    tiers, dense, values, bitmask, topk, positions, starts = packed
    dense_from, from24, topk_from, dense_count, count24, topk_count = counts(starts, block_row)
    columns += block_row.to(tl.int64) * across
    tiers += block_row.to(tl.int64) * across
    list_columns(tiers, load_tiers(tiers, 0, across, SCAN), columns, across, dense_count, count24, SCAN)
    row = (first_row + tl.arange(0, ROWS))[:, None]
    token = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS))[:, None]
    x_at = x + token.to(tl.int64) * x_row
    four = tl.arange(0, 4)[None, None, :]
    acc = tl.zeros((TOKENS, ROWS, UNITS), tl.float32)

    for start in range(0, dense_count * units, UNITS):
        unit = start + tl.arange(0, UNITS)
        inside = (unit < dense_count * units)[None, :]
        at = (unit // units * (BLOCK_ROWS * BLOCK_COLS) + unit % units * 8)[None, :] + row * BLOCK_COLS
        at = dense + dense_from * (BLOCK_ROWS * BLOCK_COLS) + at
        column = tl.load(columns + unit // units, unit < dense_count * units, 0) * BLOCK_COLS + unit % units * 8
        keep = inside & (row < BLOCK_ROWS)
        for half in tl.static_range(2):
            entries = _fours(tl.load(at[:, :, None] + 4 * half + four, keep[:, :, None], 0))
            inputs = _four_inputs(x_at, column + 4 * half, inside & (token < tokens), cols)
            for entry in tl.static_range(4):
                acc += entries[entry][None] * inputs[entry][:, None]

    for start in range(0, count24 * units, UNITS):
        unit = start + tl.arange(0, UNITS)
        inside = (unit < count24 * units)[None, :]
        at = (unit // units * (BLOCK_ROWS * units) + unit % units)[None, :] + row * units
        at = from24 * (BLOCK_ROWS * units) + at  # the index of a mask byte, and of its four values
        column = tl.load(columns + dense_count + unit // units, unit < count24 * units, 0)
        column = column * BLOCK_COLS + unit % units * 8
        keep = inside & (row < BLOCK_ROWS)
        kept = _fours(tl.load(values + 4 * at[:, :, None] + four, keep[:, :, None], 0))
        bits = tl.load(tl.multiple_of(bitmask + at, [1, 1]), keep, 0).to(tl.int32)  # the hint keeps it narrow
        for half in tl.static_range(2):
            inputs = _four_inputs(x_at, column + 4 * half, inside & (token < tokens), cols)
            lower, upper = kept[2 * half], kept[2 * half + 1]
            bit0, bit1 = (bits >> (4 * half)) & 1, (bits >> (4 * half)) & 2
            bit2, bit3 = (bits >> (4 * half)) & 4, (bits >> (4 * half)) & 8
            acc += tl.where(bit0 != 0, lower, 0.0)[None] * inputs[0][:, None]
            acc += tl.where(bit1 != 0, tl.where(bit0 != 0, upper, lower), 0.0)[None] * inputs[1][:, None]
            acc += tl.where(bit2 != 0, tl.where((bit0 | bit1) != 0, upper, lower), 0.0)[None] * inputs[2][:, None]
            acc += tl.where(bit3 != 0, upper, 0.0)[None] * inputs[3][:, None]

    if K > 0:
        for start in range(0, topk_count * K, UNITS):
            entry = start + tl.arange(0, UNITS)
            inside = entry < topk_count * K
            kept = tl.load(topk + topk_from * K + entry, inside, 0)[None, :]
            position = tl.load(positions + topk_from * K + entry, inside, 0).to(tl.int32)
            column = (
                tl.load(columns + dense_count + count24 + entry // K, inside, 0) * BLOCK_COLS + position % BLOCK_COLS
            )
            inputs = tl.load(x_at + column[None, :], (inside & (column < cols))[None, :] & (token < tokens), 0)
            acc += tl.where((position // BLOCK_COLS)[None, :] == row, kept, 0.0)[None] * inputs[:, None]

    sums = tl.sum(acc, 2)
    inside = (first_row + tl.arange(0, ROWS))[None, :]
    row = block_row * BLOCK_ROWS + inside
    inside = (inside < BLOCK_ROWS) & (row < rows)
    if bias is not None:
        sums += tl.load(bias + row, inside, 0)
    tl.store(y + token.to(tl.int64) * rows + row, sums, inside & (token < tokens))


def linear_tiered_fp32(x: Tensor, packed: Packed, bias: Tensor | None, y: Tensor) -> None:
    """Writes ``x @ W.T + bias`` of fp32 tensors into ``y``; ``x`` is a matrix."""
    (down, across), (block_rows, block_cols) = packed.blocks, packed.block
    tokens, cols = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    tokens_each = min(triton.next_power_of_2(tokens), 8)
    _linear_tiered_fp32_kernel[(down * triton.cdiv(block_rows, 8), triton.cdiv(tokens, tokens_each))](
        x,
        packed,
        torch.empty(packed.blocks, dtype=torch.int32, device=x.device),
        bias,
        y,
        tokens,
        y.shape[-1],
        cols,
        across,
        x.stride(0),
        BLOCK_ROWS=block_rows,
        BLOCK_COLS=block_cols,
        K=packed.k,
        SCAN=scan_size(across),
        TOKENS=tokens_each,
        ROWS=8,
        UNITS=128,
        num_warps=4,
        num_stages=1,
    )
