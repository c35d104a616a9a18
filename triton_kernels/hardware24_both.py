"""2:4 along rows and columns at once: packs a weight and its transpose in a hardware layout, and reads it once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Table, on
from ._metadata24 import store_metadata
from ._pairs24 import kept_entries, units
from ._pattern4x4 import best_pattern, magnitudes
from ._tiles import columns_of_tile, deinterleave, first_row, interleave, split_groups, tiles

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
def _columns(entries):
    """Returns the magnitudes of the four columns of tiles, for one of their rows."""
    return split_groups(magnitudes(entries))


@triton.jit
def _line(kept, e0, e1, e2, e3, FIRST: tl.constexpr, STEP: tl.constexpr):
    """Returns the kept entries of one line, a row or a column, of the tiles.

    The mask bits of the line are bits ``FIRST``, ``FIRST + STEP``, ... of the halves of ``kept``.
    """
    kept = kept << 15 - FIRST - 3 * STEP
    return kept_entries(kept << 3 * STEP, kept << 2 * STEP, kept << STEP, kept, e0, e1, e2, e3)


@triton.jit
def _codes(kept):
    """Returns the metadata nibbles of the eight rows of two 4x4 masks, each in the place of its row's mask bits."""
    lowest: tl.constexpr = 0x11111111
    k0, k1, k2, k3 = kept & lowest, kept >> 1 & lowest, kept >> 2 & lowest, kept >> 3 & lowest
    return k1 & (k0 ^ lowest) | ((k0 | k1) ^ lowest) << 1 | (k3 | k2 ^ lowest) << 2 | (k3 | k2) << 3


@triton.jit
def _transposed(kept):
    """Transposes two 4x4 masks: first within each 2x2, then the 2x2s among themselves."""
    moved = (kept ^ kept >> 3) & 0x0A0A0A0A
    kept = kept ^ moved ^ moved << 3
    moved = (kept ^ kept >> 6) & 0x00CC00CC
    return kept ^ moved ^ moved << 6


@triton.jit
def _stack(l0, l1, l2, l3):
    """Stacks four lines ``[R, C]`` of tiles to the rows of a matrix ``[4 * R, C]``."""
    lines = tl.join(tl.join(l0, l2), tl.join(l1, l3))  # [R, C, 2, 2]
    return tl.reshape(tl.permute(lines, [0, 2, 3, 1]), [4 * l0.shape[0], l0.shape[1]])


@triton.jit
def _units(codes):
    """Converts the codes of two tiles, ``[R, C / 2]``, to the units of ``store_metadata``, ``[4 * R, C / 2]``."""
    row = tl.arange(0, 4)[None, :, None].to(tl.uint32)
    return tl.reshape(codes[:, None, :] >> 4 * row & 0x000F000F, [4 * codes.shape[0], codes.shape[1]])


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
    """Packs a tile of the weight in both directions; a thread has whole 4x4 tiles, whose rows are loaded one by one."""
    tile_row = first_row(BLOCK_ROWS // 4) + tl.arange(0, BLOCK_ROWS // 4)[:, None]
    tile_col = columns_of_tile(BLOCK_COLS // 4, 2)
    col = columns_of_tile(BLOCK_COLS, 8).to(tl.int64)
    inside = (4 * tile_row < rows) & (col < cols)
    entries = weight + 4 * tile_row * weight_row + col * weight_col
    a = tl.load(entries, inside, 0)
    b = tl.load(entries + weight_row, inside, 0)
    c = tl.load(entries + 2 * weight_row, inside, 0)
    d = tl.load(entries + 3 * weight_row, inside, 0)
    even, odd = deinterleave(best_pattern(_columns(a), _columns(b), _columns(c), _columns(d)))
    kept = even.to(tl.uint32) | odd.to(tl.uint32) << 16
    a0, a1, a2, a3 = units(a)
    b0, b1, b2, b3 = units(b)
    c0, c1, c2, c3 = units(c)
    d0, d1, d2, d3 = units(d)

    inside = (4 * tile_row < rows) & (tile_col < cols // 4)
    line = words + 4 * tile_row * (cols // 4) + tile_col
    tl.store(line, _line(kept, a0, a1, a2, a3, 0, 1), inside)
    tl.store(line + cols // 4, _line(kept, b0, b1, b2, b3, 4, 1), inside)
    tl.store(line + 2 * (cols // 4), _line(kept, c0, c1, c2, c3, 8, 1), inside)
    tl.store(line + 3 * (cols // 4), _line(kept, d0, d1, d2, d3, 12, 1), inside)
    block = tl.program_id(0) * (BLOCK_COLS // 32)
    store_metadata(metadata, _units(_codes(kept)), first_row(BLOCK_ROWS), block, rows, cols, LAYOUT)

    byte = columns_of_tile(BLOCK_COLS // 8, 1)
    inside = (4 * tile_row < rows) & (byte < cols // 8)
    for i in tl.static_range(4):
        bits = (kept >> 4 * i & 0x0F) | (kept >> 12 + 4 * i & 0xF0)
        tl.store(bitmask + (4 * tile_row + i) * (cols // 8) + byte, bits.to(tl.uint8), inside)

    lines = _stack(
        tl.trans(_line(kept, a0, b0, c0, d0, 0, 4)),
        tl.trans(_line(kept, a1, b1, c1, d1, 1, 4)),
        tl.trans(_line(kept, a2, b2, c2, d2, 2, 4)),
        tl.trans(_line(kept, a3, b3, c3, d3, 3, 4)),
    )
    row_t = tl.program_id(0).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[:, None]
    word_t = first_row(BLOCK_ROWS // 4) + tl.arange(0, BLOCK_ROWS // 4)[None, :]
    tl.store(words_t + row_t * (rows // 4) + word_t, lines, (row_t < cols) & (word_t < rows // 4))
    codes = _codes(_transposed(kept))
    even, odd = deinterleave(tl.trans(interleave(codes & 0xFFFF, codes >> 16)))
    block = (first_row(BLOCK_ROWS) // 32).to(tl.int32)
    first = tl.program_id(0).to(tl.int64) * BLOCK_COLS
    store_metadata(metadata_t, _units(even | odd << 16), first, block, cols, rows, LAYOUT)


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
