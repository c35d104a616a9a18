"""``linear24`` of fp32, without tensor cores, which would round the inputs; and the tail and bias of both kernels."""

import triton
import triton.language as tl
from torch import Tensor

from ._tiles import split_groups


@triton.jit
def tail_and_bias(
    x, values, bias, token, tokens, row, rows, cols, x_row, x_col, values_row, values_col, TAIL: tl.constexpr
):
    """Returns the sum of the bias and the product of the last ``cols % 4`` columns, which are stored whole."""
    full = cols // 4
    total = tl.zeros_like((row + token).to(tl.float32))
    for col in tl.static_range(TAIL):
        weight = tl.load(
            values + row.to(tl.int64) * values_row + (2 * full + col).to(tl.int64) * values_col, row < rows, 0
        )
        input = tl.load(x + token.to(tl.int64) * x_row + (4 * full + col).to(tl.int64) * x_col, token < tokens, 0)
        total += weight.to(tl.float32) * input.to(tl.float32)
    if bias is not None:
        total += tl.load(bias + row, row < rows, 0).to(tl.float32)
    return total


@triton.jit
def _linear24_fp32_kernel(
    x,
    values,
    bitmask,
    bias,
    y,
    tokens,
    rows,
    cols,
    x_row,
    x_col,
    values_row,
    values_col,
    bitmask_row,
    bitmask_col,
    TAIL: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):
    groups = cols // 4
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    values_at = (values + row.to(tl.int64) * values_row)[:, None]
    bitmask_at = (bitmask + row.to(tl.int64) * bitmask_row)[:, None]
    x_at = (x + token.to(tl.int64) * x_row)[:, None]
    byte, entry = tl.arange(0, BYTES)[None, :], tl.arange(0, 4 * BYTES)[None, :]
    acc = tl.zeros((TOKENS, ROWS, BYTES), tl.float32)
    for start in range(0, (groups + 1) // 2, BYTES):  # a mask byte has two groups: four values, eight columns
        at = 4 * start + entry
        kept = tl.load(values_at + at.to(tl.int64) * values_col, (row < rows)[:, None] & (at < 2 * groups), 0)
        kept = split_groups(kept)
        at = start + byte
        # A thread needs the bits of its own values only: the hint keeps the load from being wider.
        bits_at = tl.multiple_of(bitmask_at + at.to(tl.int64) * bitmask_col, [1, 1])
        bits = tl.load(bits_at, (row < rows)[:, None] & (2 * at < groups), 0).to(tl.int32)
        for half in tl.static_range(2):
            at = 8 * start + entry // 4 * 8 + entry % 4 + 4 * half
            inputs = tl.load(x_at + at.to(tl.int64) * x_col, (token < tokens)[:, None] & (at < 4 * groups), 0)
            inputs = split_groups(inputs)
            lower, upper = kept[2 * half], kept[2 * half + 1]
            bit0, bit1 = (bits >> (4 * half)) & 1, (bits >> (4 * half)) & 2
            bit2, bit3 = (bits >> (4 * half)) & 4, (bits >> (4 * half)) & 8
            entry0 = tl.where(bit0 != 0, lower, 0.0)
            entry1 = tl.where(bit1 != 0, tl.where(bit0 != 0, upper, lower), 0.0)
            entry2 = tl.where(bit2 != 0, tl.where((bit0 | bit1) != 0, upper, lower), 0.0)
            entry3 = tl.where(bit3 != 0, upper, 0.0)
            acc += entry0[None] * inputs[0][:, None]
            acc += entry1[None] * inputs[1][:, None]
            acc += entry2[None] * inputs[2][:, None]
            acc += entry3[None] * inputs[3][:, None]

    sums = tl.sum(acc, 2)
    token, row = token[:, None], row[None, :]
    sums += tail_and_bias(x, values, bias, token, tokens, row, rows, cols, x_row, x_col, values_row, values_col, TAIL)
    tl.store(y + token.to(tl.int64) * rows + row, sums, (row < rows) & (token < tokens))


def linear24_fp32(x: Tensor, values: Tensor, bitmask: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Writes ``x @ W.T + bias`` into ``y``; ``x`` is a matrix."""
    tokens, cols = x.shape
    rows = values.shape[0]
    tokens_each = min(triton.next_power_of_2(tokens), 8)
    _linear24_fp32_kernel[(triton.cdiv(rows, 4), triton.cdiv(tokens, tokens_each))](
        x,
        values,
        bitmask,
        bias,
        y,
        tokens,
        rows,
        cols,
        *x.stride(),
        *values.stride(),
        *bitmask.stride(),
        TAIL=cols % 4,
        TOKENS=tokens_each,
        ROWS=4,
        BYTES=128,
        num_warps=4,
        num_stages=1,
    )
