"""2:4 along rows and columns at once: a weight and its transpose in a hardware layout, from one read of it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Table, on
from ._metadata24 import store_metadata
from ._select import widen
from ._tiles import first_last, first_row, quads, row_of, tiles, unpairs
from .transposable import PATTERNS

BOTH = Table(
    "prune_both_to_hardware24",
    {
        "64x64": {"BLOCK_ROWS": 64, "BLOCK_COLS": 64, "num_warps": 4},
        "64x128": {"BLOCK_ROWS": 64, "BLOCK_COLS": 128, "num_warps": 8},
        "32x256": {"BLOCK_ROWS": 32, "BLOCK_COLS": 256, "num_warps": 8},
    },
    {"any": "64x128"},
)


@triton.jit
def _pair_sums(e0, e1, e2, e3):
    """The sums of magnitudes of every pair of columns, NaN as Inf; ``e`` is a row of tiles."""
    m0, m1, m2, m3 = _magnitude(e0), _magnitude(e1), _magnitude(e2), _magnitude(e3)
    return m0 + m1, m0 + m2, m0 + m3, m1 + m2, m1 + m3, m2 + m3


@triton.jit
def _magnitude(entries):
    bits = widen(entries).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.minimum(bits, 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _best_pattern(row0, row1, row2, row3):
    """The 16 bits of the best pattern of each 4x4 tile, row by row."""
    best = tl.full(row0[0].shape, -1.0, tl.float32)
    kept = tl.zeros(row0[0].shape, tl.int32)
    for i in tl.static_range(90):
        value = (row0[PATTERNS[i][0]] + row1[PATTERNS[i][1]]) + (row2[PATTERNS[i][2]] + row3[PATTERNS[i][3]])
        kept = tl.where(value > best, PATTERNS[i][4], kept)
        best = tl.maximum(value, best)
    return kept


@triton.jit
def _select(kept, e0, e1, e2, e3, FIRST: tl.constexpr, STEP: tl.constexpr):
    """One line of each tile: the two entries that it keeps as a word, and its metadata nibble."""
    k0, k1 = (kept >> FIRST & 1) != 0, (kept >> FIRST + STEP & 1) != 0
    k2, k3 = (kept >> FIRST + 2 * STEP & 1) != 0, (kept >> FIRST + 3 * STEP & 1) != 0
    first, last = first_last(k0, k1, k2, k3, e0, e1, e2, e3)
    low, high = first.to(tl.uint16, bitcast=True).to(tl.uint32), last.to(tl.uint16, bitcast=True).to(tl.uint32)
    lower, _ = first_last(k0, k1, k2, k3, 0, 1, 2, 3)
    _, upper = first_last(k0, k1, k2, k3, 0, 4, 8, 12)
    return low | high << 16, (lower | upper).to(tl.uint32)


@triton.jit
def _stack(l0, l1, l2, l3):
    """Four lines of tiles ``[R, C]`` as the rows of a matrix ``[4 * R, C]``."""
    lines = tl.join(tl.join(l0, l2), tl.join(l1, l3))  # [R, C, 2, 2]
    return tl.reshape(tl.permute(lines, [0, 2, 3, 1]), [4 * l0.shape[0], l0.shape[1]])


@triton.jit
def _units(nibbles):
    """The nibbles of the four lines of each tile, ``[R, C]``, as the units ``[4 * R, C / 2]`` of ``store_metadata``."""
    even, odd = unpairs(nibbles)
    line = tl.arange(0, 4)[None, :, None].to(tl.uint32)
    units = (even | odd << 16)[:, None, :] >> 4 * line & 0x000F000F
    return tl.reshape(units, [4 * nibbles.shape[0], nibbles.shape[1] // 2])


@triton.jit
def _prune_both_to_hardware24_kernel(
    weight,
    words,
    metadata,
    words_t,
    metadata_t,
    bitmask,
    rows,
    cols,
    weight_row,
    weight_col,
    LAYOUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """A thread has whole 4x4 tiles: it loads their four rows one by one."""
    tile_row = first_row(BLOCK_ROWS // 4) + tl.arange(0, BLOCK_ROWS // 4)[:, None]
    tile_col = row_of(BLOCK_COLS // 4, 2)
    col = row_of(BLOCK_COLS, 8).to(tl.int64)
    inside = (4 * tile_row < rows) & (col < cols)
    entries = weight + 4 * tile_row * weight_row + col * weight_col
    a0, a1, a2, a3 = quads(tl.load(entries, inside, 0))
    b0, b1, b2, b3 = quads(tl.load(entries + weight_row, inside, 0))
    c0, c1, c2, c3 = quads(tl.load(entries + 2 * weight_row, inside, 0))
    d0, d1, d2, d3 = quads(tl.load(entries + 3 * weight_row, inside, 0))
    kept = _best_pattern(
        _pair_sums(a0, a1, a2, a3), _pair_sums(b0, b1, b2, b3), _pair_sums(c0, c1, c2, c3), _pair_sums(d0, d1, d2, d3)
    )

    row_a, code_a = _select(kept, a0, a1, a2, a3, 0, 1)
    row_b, code_b = _select(kept, b0, b1, b2, b3, 4, 1)
    row_c, code_c = _select(kept, c0, c1, c2, c3, 8, 1)
    row_d, code_d = _select(kept, d0, d1, d2, d3, 12, 1)
    inside = (4 * tile_row < rows) & (tile_col < cols // 4)
    line = words + 4 * tile_row * (cols // 4) + tile_col
    tl.store(line, row_a, inside)
    tl.store(line + cols // 4, row_b, inside)
    tl.store(line + 2 * (cols // 4), row_c, inside)
    tl.store(line + 3 * (cols // 4), row_d, inside)
    units = _units(code_a | code_b << 4 | code_c << 8 | code_d << 12)
    store_metadata(metadata, units, first_row(BLOCK_ROWS), tl.program_id(0) * (BLOCK_COLS // 32), rows, cols, LAYOUT)

    even, odd = unpairs(kept)
    byte = row_of(BLOCK_COLS // 8, 1)
    inside = (4 * tile_row < rows) & (byte < cols // 8)
    for i in tl.static_range(4):
        bits = (even >> 4 * i & 15) | (odd >> 4 * i & 15) << 4
        tl.store(bitmask + (4 * tile_row + i) * (cols // 8) + byte, bits.to(tl.uint8), inside)

    col_0, code_0 = _select(kept, a0, b0, c0, d0, 0, 4)
    col_1, code_1 = _select(kept, a1, b1, c1, d1, 1, 4)
    col_2, code_2 = _select(kept, a2, b2, c2, d2, 2, 4)
    col_3, code_3 = _select(kept, a3, b3, c3, d3, 3, 4)
    lines = _stack(tl.trans(col_0), tl.trans(col_1), tl.trans(col_2), tl.trans(col_3))
    row_t = tl.program_id(0).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[:, None]
    word_t = first_row(BLOCK_ROWS // 4) + tl.arange(0, BLOCK_ROWS // 4)[None, :]
    tl.store(words_t + row_t * (rows // 4) + word_t, lines, (row_t < cols) & (word_t < rows // 4))
    units = _units(tl.trans(code_0 | code_1 << 4 | code_2 << 8 | code_3 << 12))
    block_t = (first_row(BLOCK_ROWS) // 32).to(tl.int32)
    store_metadata(metadata_t, units, tl.program_id(0).to(tl.int64) * BLOCK_COLS, block_t, cols, rows, LAYOUT)


def prune_both_to_hardware24(weight: Tensor, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols = weight.shape
    packed, packed_t = (weight.new_empty(rows * cols // 16 * 9) for _ in range(2))
    bitmask = weight.new_empty(rows, cols // 8, dtype=torch.uint8)
    if weight.numel() == 0:
        return packed, packed_t, bitmask
    halves = rows * cols // 2
    config = BOTH.config(weight, "any")
    with on(weight):
        _prune_both_to_hardware24_kernel[tiles(rows, cols, config)](
            weight,
            packed[:halves].view(torch.int32),
            packed[halves:].view(torch.int32),
            packed_t[:halves].view(torch.int32),
            packed_t[halves:].view(torch.int32),
            bitmask,
            rows,
            cols,
            *weight.stride(),
            LAYOUT=layout,
            **config,
        )
    return packed, packed_t, bitmask
