"""Strips: the blocks, side by side, that one program holds as 16 slices (see ``_planes``)."""

from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._launch import Config, architecture
from ._planes import unpack_bytes, unpack_words


class Strip(NamedTuple):
    """Shape of a program's strip: one argument of a kernel, whose fields are compile-time constants."""

    block_rows: tl.constexpr
    block_cols: tl.constexpr
    cols: tl.constexpr  # columns of a block after padding
    width: tl.constexpr  # columns of a slice, which is several rows of a block, one row or a part of one
    blocks: tl.constexpr
    vector: tl.constexpr  # columns that a thread loads at once; with more, entries would move between threads
    whole: tl.constexpr  # whether all entries of all strips are inside the matrix


@lru_cache(maxsize=4096)
def _strip(*sizes: int) -> Strip:
    """Returns the strip of these fields, which is kept: it is faster to find than to make."""
    return Strip(*map(tl.constexpr, sizes))


@triton.jit
def blocks_of(cols, strip):
    """Returns the row of blocks of this program, int64, and its blocks ``[1, BLOCKS, 1]``."""
    strips = tl.cdiv(tl.cdiv(cols, strip.block_cols), strip.blocks)
    block = tl.program_id(0) % strips * strip.blocks + tl.arange(0, strip.blocks)[None, :, None]
    return (tl.program_id(0) // strips).to(tl.int64), block


@triton.jit
def place(rows, cols, strip, SLICES: tl.constexpr, UNIT: tl.constexpr = 1):
    """Returns the row, int64, and the column of entries, and which are in the matrix: ``[SLICES, BLOCKS, WIDTH]``.

    Columns are counted in units of ``UNIT``.
    """
    block_cols: tl.constexpr = strip.block_cols // UNIT
    padded: tl.constexpr = strip.cols // UNIT
    width: tl.constexpr = strip.width // UNIT
    vector: tl.constexpr = strip.vector // UNIT if strip.vector < strip.cols else padded
    block_row, block = blocks_of(cols, strip)
    entry = tl.arange(0, SLICES)[:, None, None] * width + tl.arange(0, width)[None, None, :]
    below, beside = entry // padded, tl.max_contiguous(entry % padded, [1, 1, vector])
    row, col = block_row * strip.block_rows + below, block * block_cols + beside
    if strip.whole:
        inside = tl.full([SLICES, strip.blocks, width], 1, tl.int1)
    else:
        inside = (below < strip.block_rows) & (row < rows) & (beside < block_cols) & (col < cols // UNIT)
    return row, col, inside


@triton.jit
def store_mask(kept, mask, rows, cols, strip):
    """Stores the kept entries, given as words of a plane, to a contiguous mask of int8, or of int32 for four each."""
    if mask.dtype.element_ty == tl.int32:
        unit: tl.constexpr = 4
        bools = unpack_bytes(kept)
    else:
        unit: tl.constexpr = 1
        bools = (unpack_words(kept) & 1).to(tl.int8)
    row, col, inside = place(rows, cols, strip, 16, unit)
    tl.store(mask + row * (cols // unit) + col, bools, inside)


def warp_lanes(tensor: Tensor) -> int:
    """Returns how many threads a warp has on the tensor's device."""
    return 64 if architecture(tensor).startswith("gfx9") else 32


def plan_strips(
    like: Tensor, block_rows: int, block_cols: int, width: int, key_bytes: int, config: Config
) -> tuple[int, Strip, int] | None:
    """Returns the grid, the strip of a program and its warps, or None where a block does not fit the registers.

    Args:
        like: the matrix.
        block_rows, block_cols: sides of a block.
        width: the least number of columns of a slice.
        key_bytes: the size of a key; a thread holds 16 bytes of keys of every slice.
        config: the kernel's configuration.
    """
    rows, cols = like.shape
    padded = max(2, triton.next_power_of_2(block_cols))
    width = max(width, padded * triton.next_power_of_2(block_rows) // 16)
    vector = 16 // key_bytes
    lanes = warp_lanes(like)
    if width > 512 * vector:
        return None
    warps = max(config["num_warps"], width // (vector * lanes))
    across = triton.cdiv(cols, block_cols)
    blocks = min(max(1, vector * lanes * warps // width), triton.next_power_of_2(across))
    whole = width * 16 == block_rows * block_cols and rows % block_rows == 0 and cols % (block_cols * blocks) == 0
    strip = _strip(block_rows, block_cols, padded, width, blocks, vector, whole)
    return triton.cdiv(rows, block_rows) * triton.cdiv(across, blocks), strip, warps
