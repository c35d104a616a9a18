"""``x @ W.T + bias`` that reads a quantized 2:4 ``W`` directly: codes become numbers in registers."""

import math

import triton
import triton.language as tl
from torch import Tensor

from ._launch import Table, architecture, on
from ._tiles import deinterleave, interleave, join_groups

# A program takes ROWS rows and TOKENS tokens. It has SPLITS warps for as many pieces of the columns at once, whose sums
# are added at the end: with few tokens there are too few rows to keep all warps busy otherwise. A class of shapes is
# named by the most tokens that it has. Not measured on a GPU yet.
TABLE = Table(
    "linear24q",
    {
        "16x16_split": {"ROWS": 16, "TOKENS": 16, "SPLITS": 4, "BLOCK": 64, "num_warps": 4, "num_stages": 2},
        "16x32_split": {"ROWS": 16, "TOKENS": 32, "SPLITS": 4, "BLOCK": 64, "num_warps": 4, "num_stages": 2},
        "64x64": {"ROWS": 64, "TOKENS": 64, "SPLITS": 1, "BLOCK": 32, "num_warps": 8, "num_stages": 2},
    },
    {"16": "16x16_split", "32": "16x32_split", "more": "64x64"},
)
# Of QLoRA (https://arxiv.org/abs/2305.14314, appendix E), as in ops/quant24.py.
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_LEVELS = {"int8": None, "int4": None, "nf4": NF4_LEVELS}


@triton.jit
def _numbers(codes, DTYPE: tl.constexpr, FOUR_BITS: tl.constexpr, LEVELS: tl.constexpr):
    """Returns the numbers that codes stand for: of ``DTYPE``, or where there are levels, float32."""
    if LEVELS is not None:
        numbers = tl.full(codes.shape, LEVELS[0], tl.float32)
        for code in tl.static_range(1, 16):
            numbers = tl.where(codes == code, LEVELS[code], numbers)
    elif FOUR_BITS:
        numbers = ((codes ^ 8) - 8).to(tl.float32).to(DTYPE)
    else:
        numbers = codes.to(tl.float32).to(DTYPE)
    return numbers


@triton.jit
def _load_numbers(
    values, byte, stored, keep, BYTES: tl.constexpr, DTYPE: tl.constexpr, FOUR_BITS: tl.constexpr, LEVELS: tl.constexpr
):
    """Returns both numbers of groups, as one tensor each.

    ``values`` points to the rows, ``byte`` is the mask's byte where they begin, and ``keep`` which rows there are:
    ``[lines, 1]``. A row has ``stored`` bytes.
    """
    if FOUR_BITS:  # a byte has both codes of a group
        at = 2 * byte + tl.arange(0, 2 * BYTES)[None, :]
        codes = tl.load(values + at, keep & (at < stored), 0, eviction_policy="evict_first").to(tl.int32)
        first, last = codes & 15, codes >> 4
    else:
        at = 4 * byte + tl.arange(0, 4 * BYTES)[None, :]
        first, last = deinterleave(tl.load(values + at, keep & (at < stored), 0, eviction_policy="evict_first"))
    return _numbers(first, DTYPE, FOUR_BITS, LEVELS), _numbers(last, DTYPE, FOUR_BITS, LEVELS)


@triton.jit
def _product(weight, inputs, TARGET: tl.constexpr):
    """Multiplies ``[splits, rows, columns]`` by the transposed ``[splits, tokens, columns]``."""
    if TARGET == "":  # the interpreter of Triton 3.7 would multiply the bits of bfloat16
        weight, inputs = weight.to(tl.float32), inputs.to(tl.float32)
    if weight.shape[0] == 1:  # warps would take one matrix each
        weight = tl.reshape(weight, weight.shape[1], weight.shape[2])
        inputs = tl.reshape(inputs, inputs.shape[1], inputs.shape[2])
        product = tl.dot(weight, tl.trans(inputs), input_precision="ieee")
        product = tl.reshape(product, 1, product.shape[0], product.shape[1])
    else:
        product = tl.dot(weight, tl.permute(inputs, (0, 2, 1)), input_precision="ieee")
    return product


@triton.jit(do_not_specialize=["tokens"])
def _linear24q_kernel(
    x,
    values,
    scales,
    bitmask,
    bias,
    y,
    tokens,
    rows,
    cols,
    values_cols,
    scales_cols,
    bitmask_cols,
    GROUP: tl.constexpr,
    FOUR_BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    THIRD: tl.constexpr,
    TARGET: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    DTYPE: tl.constexpr = x.dtype.element_ty
    BYTES: tl.constexpr = BLOCK // 8
    PIECES: tl.constexpr = (GROUP + BLOCK - 1) // BLOCK  # of a group of columns, which have one scale
    tiles = tl.cdiv(tokens, TOKENS)
    row_tile, token_tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles  # neighboring programs share rows, in L2
    line = tl.arange(0, SPLITS * ROWS)[:, None]
    row, row_split = (row_tile * ROWS + line % ROWS).to(tl.int64), line // ROWS
    line = tl.arange(0, SPLITS * TOKENS)[:, None]
    token, token_split = (token_tile * TOKENS + line % TOKENS).to(tl.int64), line // TOKENS
    each_byte, each_col = tl.arange(0, BYTES)[None, :], tl.arange(0, BLOCK)[None, :]
    acc = tl.zeros((SPLITS, ROWS, TOKENS), tl.float32)
    for step in range(0, scales_cols * PIECES, SPLITS):
        piece = step + row_split
        byte = piece // PIECES * (GROUP // 8) + piece % PIECES * BYTES  # of the mask; columns are eight times as many
        inside = (row < rows) & (byte + each_byte < bitmask_cols)
        if GROUP % BLOCK:
            inside = inside & (piece % PIECES * BYTES + each_byte < GROUP // 8)
        bits = tl.load(bitmask + row * bitmask_cols + byte + each_byte, inside, 0).to(tl.int32)
        bits = interleave(bits & 15, bits >> 4)
        b0, b1, b2, b3 = (bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0, (bits & 8) != 0
        of_row = values + row * values_cols
        first, last = _load_numbers(of_row, byte, values_cols, row < rows, BYTES, DTYPE, FOUR_BITS, LEVELS)
        third = tl.where(b3, first, last)
        if THIRD:  # a tail of three columns is stored whole; its last code is the row's
            code = tl.load(of_row + values_cols - 1, row < rows, 0).to(tl.int32)
            number = _numbers(code & 15 if FOUR_BITS else code, DTYPE, FOUR_BITS, LEVELS)
            third = tl.where(8 * byte + 4 * tl.arange(0, 2 * BYTES)[None, :] + 3 == cols, number, third)
        zero = tl.zeros_like(first)
        weight = join_groups(
            tl.where(b0, first, zero),
            tl.where(b1, tl.where(b0, last, first), zero),
            tl.where(b2, third, zero),
            tl.where(b3, last, zero),
        )
        weight = tl.reshape(weight, SPLITS, ROWS, BLOCK)
        scale = tl.load(
            scales + row * scales_cols + piece // PIECES, (row < rows) & (piece < scales_cols * PIECES), 0
        ).to(tl.float32)

        piece = step + token_split
        col = piece // PIECES * GROUP + piece % PIECES * BLOCK + each_col
        inside = (token < tokens) & (col < cols)
        if GROUP % BLOCK:
            inside = inside & (piece % PIECES * BLOCK + each_col < GROUP)
        inputs = tl.reshape(tl.load(x + token * cols + col, inside, 0), SPLITS, TOKENS, BLOCK)
        product = _product(weight.to(DTYPE), inputs, TARGET)
        if LEVELS is not None and DTYPE != tl.float32:  # what rounding to 16 bits leaves out, which is never Inf or NaN
            rest = (weight - weight.to(DTYPE).to(tl.float32)).to(DTYPE)
            wide = inputs.to(tl.float32)
            product += _product(rest, tl.where(tl.abs(wide) < float("inf"), wide, 0.0).to(DTYPE), TARGET)
        acc += product * tl.reshape(scale, SPLITS, ROWS, 1)

    sums = tl.sum(acc, 0)
    row = row_tile * ROWS + tl.arange(0, ROWS)[:, None]
    token = (token_tile * TOKENS + tl.arange(0, TOKENS)[None, :]).to(tl.int64)
    if bias is not None:
        sums += tl.load(bias + row, row < rows, 0).to(tl.float32)
    tl.store(y + token * rows + row, sums.to(DTYPE), (row < rows) & (token < tokens))


def linear24q(
    x: Tensor, values: Tensor, scales: Tensor, bitmask: Tensor, bias: Tensor | None, quant_type: str, group: int
) -> Tensor:
    rows, cols = values.shape[0], x.shape[-1]
    tokens = math.prod(x.shape[:-1])
    y = x.new_empty((*x.shape[:-1], rows))
    if not (tokens and rows):
        return y
    config = TABLE.config(x, "16" if tokens <= 16 else "32" if tokens <= 32 else "more")
    with on(x):
        _linear24q_kernel[(triton.cdiv(rows, config["ROWS"]) * triton.cdiv(tokens, config["TOKENS"]),)](
            x.contiguous(),
            values.contiguous(),
            scales.contiguous(),
            bitmask.contiguous(),
            None if bias is None else bias.contiguous(),
            y,
            tokens,
            rows,
            cols,
            values.shape[1],
            scales.shape[1],
            bitmask.shape[1],
            GROUP=group,
            FOUR_BITS=quant_type != "int8",
            LEVELS=_LEVELS[quant_type],
            THIRD=cols % 4 == 3,
            TARGET=architecture(x)[:2],
            **config | {"BLOCK": max(min(config["BLOCK"], triton.next_power_of_2(group)), 16)},
        )
    return y
