"""Loads of tiered blocks in the layout of ``mma`` operands, where a warp holds eight rows, or tokens, by four threads.

Each of the four threads has a unit of its own: eight columns of a dense block, or eight or sixteen of a 2:4 block.
Units are numbered through all blocks of one form in a row of blocks. With every load, each warp takes its next four.
"""

import triton
import triton.language as tl

from ._decode24 import operand, split_words


@triton.jit
def _unit_start(
    base,
    step,
    lane,
    within,
    LOAD: tl.constexpr,
    LOADS: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    UNITS: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Returns where a thread's unit starts: a unit has ``WIDTH`` elements, a block ``SIZE``, a row is at ``within``."""
    if 4 * WARPS % UNITS == 0:  # a thread adds the same in every step; in 64 bits, the part of LOAD is an immediate
        load: tl.constexpr = 4 * WARPS // UNITS * SIZE
        first = (lane // UNITS * SIZE + within + lane % UNITS * WIDTH).to(tl.int64)
        return base + (first + tl.cast(step, tl.int64) * (LOADS * load) + LOAD * load)
    unit = (step * LOADS + LOAD) * (4 * WARPS) + lane
    return base + (unit // UNITS * SIZE + within + unit % UNITS * WIDTH)


@triton.jit
def _inside(step, lane, count, LOAD: tl.constexpr, LOADS: tl.constexpr, UNITS: tl.constexpr, WARPS: tl.constexpr):
    """Checks whether the thread's unit exists."""
    return step * (LOADS * 4 * WARPS) < count * UNITS - lane - LOAD * 4 * WARPS


@triton.jit
def load_dense(
    words,
    step,
    lane,
    row,
    count,
    LOAD: tl.constexpr,
    LOADS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Loads the four words of a dense unit in each row: ``[rows, 4, 4]``."""
    units: tl.constexpr = BLOCK_COLS // 8
    size: tl.constexpr = BLOCK_ROWS * BLOCK_COLS // 2
    at = _unit_start(words, step, lane, row * (BLOCK_COLS // 2), LOAD, LOADS, size, 4, units, WARPS)
    keep = _inside(step, lane, count, LOAD, LOADS, units, WARPS) & (row < BLOCK_ROWS)
    at = at[:, :, None] + tl.arange(0, 4)[None, None, :]
    return tl.load(at, keep[:, :, None], 0, eviction_policy="evict_first")


@triton.jit
def load24(
    words,
    bitmask,
    step,
    lane,
    row,
    count,
    LOAD: tl.constexpr,
    LOADS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    GROUPS: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Loads a 2:4 unit in each row: a word of values per group, ``[rows, 4, GROUPS]``, and mask bits, ``[rows, 4]``."""
    units: tl.constexpr = BLOCK_COLS // (4 * GROUPS)
    size: tl.constexpr = BLOCK_ROWS * BLOCK_COLS // 4
    keep = _inside(step, lane, count, LOAD, LOADS, units, WARPS) & (row < BLOCK_ROWS)
    at = _unit_start(words, step, lane, row * (BLOCK_COLS // 4), LOAD, LOADS, size, GROUPS, units, WARPS)
    at = at[:, :, None] + tl.arange(0, GROUPS)[None, None, :]
    values = tl.load(at, keep[:, :, None], 0, eviction_policy="evict_first")
    at = bitmask.to(tl.pointer_type(tl.int16 if GROUPS == 4 else tl.uint8))
    at = _unit_start(at, step, lane, row * units, LOAD, LOADS, BLOCK_ROWS * units, 1, units, WARPS)
    at = tl.multiple_of(at, [GROUPS // 2, GROUPS // 2])  # the hint keeps loads from widening
    return values, tl.load(at, keep, 0).to(tl.int32)


@triton.jit
def load_x(
    x_words,
    columns,
    step,
    lane,
    live,
    count,
    row_words,
    LOADS: tl.constexpr,
    WHOLE: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Loads the inputs that meet each unit: ``WORDS`` words per token and load, ``[octets, WARPS, 8, 4]`` each."""
    units: tl.constexpr = BLOCK_COLS // (2 * WORDS)
    inputs = ()
    for load in tl.static_range(LOADS):
        keep = _inside(step, lane, count, load, LOADS, units, WARPS) & live
        column = tl.load(_unit_start(columns, step, lane, 0, load, LOADS, 1, 0, units, WARPS), keep, 0)
        unit = lane if 4 * WARPS % units == 0 else (step * LOADS + load) * (4 * WARPS) + lane
        word = (column * (BLOCK_COLS // 2) + unit % units * WORDS).to(tl.int64)
        for part in tl.static_range(WORDS // 4):
            at = word[:, :, None] + (4 * part + tl.arange(0, 4))[None, None, :]
            inside = keep[:, :, None] if WHOLE else keep[:, :, None] & (at < row_words)
            inputs += split_words(tl.load(x_words[:, :, None] + at, inside, 0), WARPS)
    return inputs


@triton.jit
def load_entries(topk, positions, columns, step, count, WARPS: tl.constexpr, K: tl.constexpr):
    """Loads four top-k entries per thread, their positions and their block's column; eight threads load the same."""
    quads: tl.constexpr = (K + 3) // 4
    quad = (step * WARPS + tl.arange(0, 8 * WARPS)[:, None] // 8) * 4 + tl.arange(0, 4)[None, :]
    block, keep = quad // quads, quad < count * quads
    first = quad - block * quads
    at = (block * K + 4 * first).to(tl.int64)
    entries, places = (), ()
    for slot in tl.static_range(4):
        inside = keep if 4 * quads - 4 + slot < K else keep & (first < quads - 1)
        entries += (tl.load(topk.to(tl.pointer_type(tl.uint16)) + (at + slot), inside, 0).to(tl.int32),)
        places += (tl.load(positions + (at + slot), inside, 0).to(tl.int32),)
    return entries, places, tl.load(columns + block, keep, 0)


@triton.jit
def multiply_entries(
    entries,
    places,
    column,
    acc,
    x,
    x_row,
    first_token,
    tokens,
    first_row,
    cols,
    WHOLE: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    OCTETS: tl.constexpr,
    TOKEN_OCTETS: tl.constexpr,
    WARPS: tl.constexpr,
    TARGET: tl.constexpr,
):
    """Adds the products of top-k entries and their inputs to ``acc``.

    The entries become a matrix with one entry in each column, for ``mma``.
    """
    lane = tl.arange(0, 8)[None, None, :, None]
    own = first_row + 8 * tl.arange(0, OCTETS)[:, None, None, None] + lane
    token = first_token + 8 * tl.arange(0, TOKEN_OCTETS)[:, None, None, None] + lane
    x_at = x.to(tl.pointer_type(tl.uint16)) + token.to(tl.int64) * x_row
    column = tl.reshape(column * BLOCK_COLS, 1, WARPS, 8, 4)
    left, right = (), ()
    for slot in tl.static_range(4):
        place = tl.reshape(places[slot], 1, WARPS, 8, 4)
        col = column + place % BLOCK_COLS
        live = token < tokens if WHOLE else (token < tokens) & (col < cols)
        left += (tl.where(place // BLOCK_COLS == own, tl.reshape(entries[slot], 1, WARPS, 8, 4), 0),)
        right += (tl.load(x_at + col, live, 0).to(tl.int32),)
    left = operand(left[0] | left[1] << 16, left[2] | left[3] << 16, x.dtype.element_ty)
    right = operand(right[0] | right[1] << 16, right[2] | right[3] << 16, x.dtype.element_ty)
    return multiply(left, right, acc, TARGET)


@triton.jit
def multiply(left, right, acc, TARGET: tl.constexpr):
    """Adds the product of two operands to ``acc``, for every warp."""
    if TARGET == "":  # the interpreter of Triton 3.7 would multiply the bits of bfloat16
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, tl.permute(right, (0, 2, 1)), acc, input_precision="ieee")
