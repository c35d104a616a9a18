"""Metadata of the hardware layouts: a nibble for every group of four, in the order that tensor cores read.

In every layout two 32-bit words hold the nibbles of 32 columns of the rows r and r + 8. Layouts differ in the order of
the nibbles within these words and in where the words are stored.
"""

import triton
import triton.language as tl


@triton.jit
def _shifts(ROWS: tl.constexpr, UNITS: tl.constexpr, LAYOUT: tl.constexpr):
    """Returns the bit of a word at which the first nibble of a unit of eight columns starts: ``[ROWS, UNITS]``."""
    half = tl.arange(0, ROWS)[:, None] // 8 % 2
    unit = tl.arange(0, UNITS)[None, :]
    if LAYOUT == "cusparselt_sm90":
        shift = 4 * half + unit // 2 % 2 * 8
    else:
        shift = 16 * half + unit % 2 * 8
    return shift.to(tl.uint32)


@triton.jit
def _runs(row, block, rows, cols, ROWS: tl.constexpr, BLOCKS: tl.constexpr, LAYOUT: tl.constexpr):
    """Returns the offsets of a tile's words, and which of them are inside the matrix: ``[BLOCKS, ROWS]`` each.

    ``row`` is the tile's first row, a multiple of ``ROWS``; ``block`` is its first block of 32 columns.
    """
    block += tl.arange(0, BLOCKS)[:, None]
    row += tl.arange(0, ROWS)[None, :]
    if LAYOUT == "cusparselt_sm90":
        where = row // 64 * (2 * cols) + row % 64 + block * 64
    elif LAYOUT == "cusparselt_sm80":
        where = row // 128 * 256 + row % 128 + block // 2 * (2 * rows.to(tl.int64)) + block % 2 * 128
    else:
        where = row + block * rows.to(tl.int64)
    return where, (row < rows) & (32 * block < cols)


@triton.jit
def store_metadata(metadata, units, row, block, rows, cols, LAYOUT: tl.constexpr):
    """Stores the nibbles of a tile that starts at ``row`` and at column ``32 * block``.

    ``units`` is uint32 ``[ROWS, COLS / 8]``: the low half of a word has the nibble of an even group, the high half
    that of the odd group after it.
    """
    ROWS: tl.constexpr = units.shape[0]
    BLOCKS: tl.constexpr = units.shape[1] // 4
    if LAYOUT != "cusparselt_sm90":
        units = (units | units >> 12) & 0xFF
    units = units << _shifts(ROWS, units.shape[1], LAYOUT)
    words = tl.xor_sum(tl.reshape(units, [ROWS // 16, 2, 8, BLOCKS, 2, 2]), 1)  # [ROWS / 16, 8, BLOCKS, 2, 2]
    if LAYOUT == "cusparselt_sm90":
        words = tl.permute(tl.xor_sum(words, 3), [2, 0, 1, 3])
    else:
        words = tl.reshape(tl.xor_sum(words, 4), [ROWS // 32, 2, 8, BLOCKS, 2])
        words = tl.permute(words, [3, 0, 2, 1, 4])
    where, inside = _runs(row, block, rows, cols, ROWS, BLOCKS, LAYOUT)
    tl.store(metadata + where, tl.reshape(words, [BLOCKS, ROWS]), inside)


@triton.jit
def load_metadata(metadata, row, block, rows, cols, ROWS: tl.constexpr, BLOCKS: tl.constexpr, LAYOUT: tl.constexpr):
    """Loads what ``store_metadata`` stores: the nibbles of the even and of the odd groups, ``[ROWS, 4 * BLOCKS]``."""
    where, inside = _runs(row, block, rows, cols, ROWS, BLOCKS, LAYOUT)
    words = tl.load(metadata + where, inside, 0)
    if LAYOUT == "cusparselt_sm90":
        words = tl.permute(tl.reshape(words, [BLOCKS, ROWS // 16, 8, 2]), [1, 2, 0, 3])
        words = tl.reshape(words, [ROWS // 16, 1, 8, BLOCKS, 1, 2])
    else:
        words = tl.permute(tl.reshape(words, [BLOCKS, ROWS // 32, 8, 2, 2]), [1, 3, 2, 0, 4])
        words = tl.reshape(words, [ROWS // 16, 1, 8, BLOCKS, 2, 1])
    words = tl.broadcast_to(words, [ROWS // 16, 2, 8, BLOCKS, 2, 2])
    units = tl.reshape(words, [ROWS, 4 * BLOCKS]) >> _shifts(ROWS, 4 * BLOCKS, LAYOUT)
    return units & 15, units >> (16 if LAYOUT == "cusparselt_sm90" else 4) & 15
