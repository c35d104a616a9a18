"""The metadata of the hardware layouts: a nibble for every group, in the order of the tensor cores.

In all of them 64 bits hold the groups of 32 columns of the rows r and r + 8. What differs is the order of the nibbles
in those 64 bits, and where these are: runs of one 32-bit word per row, for every 32 columns.
"""

import triton
import triton.language as tl


@triton.jit
def _shifts(ROWS: tl.constexpr, GROUPS: tl.constexpr, LAYOUT: tl.constexpr):
    """``[ROWS, GROUPS]``: by how many bits each nibble is shifted in its 32-bit word."""
    half = tl.arange(0, ROWS)[:, None] // 8 % 2
    group = tl.arange(0, GROUPS)[None, :]
    if LAYOUT == "cusparselt_sm90":
        return 4 * (half + group // 4 % 2 * 2 + group % 2 * 4)
    return 4 * (half * 4 + group % 4)


@triton.jit
def _runs(row, block, rows, cols, ROWS: tl.constexpr, BLOCKS: tl.constexpr, LAYOUT: tl.constexpr):
    """``[BLOCKS, ROWS]``: where the words of a tile are, in words, and whether the tile has them.

    ``ROWS`` is 32 or 64 and divides ``row``, the tile's first; ``block`` is its first block of 32 columns.
    """
    block += tl.arange(0, BLOCKS)[:, None]
    word = tl.arange(0, ROWS)[None, :]
    if LAYOUT == "cusparselt_sm90":
        start = row // 64 * (2 * cols) + block * 64 + row % 64
    elif LAYOUT == "cusparselt_sm80":
        start = block // 2 * (2 * rows.to(tl.int64)) + row // 128 * 256 + block % 2 * 128 + row % 128
    else:
        start = block * rows.to(tl.int64) + row
    return start + word, (row + word < rows) & (32 * block < cols)


@triton.jit
def store_metadata(metadata, codes, row, block, rows, cols, LAYOUT: tl.constexpr):
    """Stores the nibbles ``[ROWS, COLS / 4]`` of the tile at ``row`` and ``32 * block``, int32."""
    ROWS: tl.constexpr = codes.shape[0]
    BLOCKS: tl.constexpr = codes.shape[1] // 8
    codes = codes << _shifts(ROWS, codes.shape[1], LAYOUT)
    words = tl.xor_sum(tl.reshape(codes, [ROWS // 16, 2, 8, BLOCKS, 2, 2, 2]), 6)
    words = tl.xor_sum(words, 1)  # [ROWS / 16, 8, BLOCKS, 2, 2]
    if LAYOUT == "cusparselt_sm90":
        words = tl.permute(tl.xor_sum(words, 3), [2, 0, 1, 3])
    else:
        words = tl.reshape(tl.xor_sum(words, 4), [ROWS // 32, 2, 8, BLOCKS, 2])
        words = tl.permute(words, [3, 0, 2, 1, 4])
    where, inside = _runs(row, block, rows, cols, ROWS, BLOCKS, LAYOUT)
    tl.store(metadata + where, tl.reshape(words, [BLOCKS, ROWS]), inside)


@triton.jit
def load_metadata(metadata, row, block, rows, cols, ROWS: tl.constexpr, BLOCKS: tl.constexpr, LAYOUT: tl.constexpr):
    """The nibbles that ``store_metadata`` stored."""
    where, inside = _runs(row, block, rows, cols, ROWS, BLOCKS, LAYOUT)
    words = tl.load(metadata + where, inside, 0)
    if LAYOUT == "cusparselt_sm90":
        words = tl.permute(tl.reshape(words, [BLOCKS, ROWS // 16, 8, 2]), [1, 2, 0, 3])
        words = tl.reshape(words, [ROWS // 16, 1, 8, BLOCKS, 1, 2, 1])
    else:
        words = tl.permute(tl.reshape(words, [BLOCKS, ROWS // 32, 8, 2, 2]), [1, 3, 2, 0, 4])
        words = tl.reshape(words, [ROWS // 16, 1, 8, BLOCKS, 2, 1, 1])
    words = tl.broadcast_to(words, [ROWS // 16, 2, 8, BLOCKS, 2, 2, 2])
    return tl.reshape(words, [ROWS, 8 * BLOCKS]) >> _shifts(ROWS, 8 * BLOCKS, LAYOUT) & 15
