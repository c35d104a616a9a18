"""What a program reads and writes of a strip of blocks that lie side by side, as 16 slices (see ``_planes``)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Config, architecture
from ._planes import has, quad_bytes
from ._tiles import pairs, unpairs

MANTISSA = {torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}


@triton.jit
def place(s: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows and columns of the entries of slice ``s`` in a block of ``COLS`` columns: ``[1, WIDTH]``."""
    entry = tl.arange(0, WIDTH)[None, :]
    if WIDTH <= COLS:
        row, col = s * WIDTH // COLS, s * WIDTH % COLS + entry
    else:
        row, col = s * (WIDTH // COLS) + entry // COLS, entry % COLS
    return row, col


@triton.jit
def _valid_slices(entry, rows, cols, COLS: tl.constexpr, WIDTH: tl.constexpr):
    segments: tl.constexpr = COLS // WIDTH if COLS > WIDTH else 1  # slices of one row
    spanned: tl.constexpr = WIDTH // COLS if WIDTH > COLS else 1  # rows of one slice
    repeated: tl.constexpr = 0xFFFF // ((1 << segments) - 1)
    down = tl.minimum((rows - entry // COLS + spanned - 1) // spanned * segments, 16)
    across = tl.minimum(tl.maximum((cols - entry % COLS + WIDTH - 1) // WIDTH, 0), segments)
    return (((1 << down) - 1) & (((1 << across) - 1) * repeated)).to(tl.uint32)


@triton.jit
def valid_words(
    top,
    left,
    rows,
    cols,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    COLS: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Which entries of the blocks are inside the matrix: words as of a plane."""
    if WHOLE:
        words = tl.full([left.shape[0], WIDTH // 2], 0xFFFFFFFF, tl.uint32)
    else:
        down, across = tl.minimum(rows - top, BLOCK_ROWS).to(tl.int32), tl.minimum(cols - left, BLOCK_COLS)
        even = tl.arange(0, WIDTH // 2)[None, :] * 2
        low = _valid_slices(even, down, across, COLS, WIDTH)
        words = low | _valid_slices(even + 1, down, across, COLS, WIDTH) << 16
    return words


@triton.jit
def first_entry(cols, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCKS: tl.constexpr):
    """The first row of this program's blocks, int64, and their first columns, ``[BLOCKS, 1]``."""
    strips = tl.cdiv(tl.cdiv(cols, BLOCK_COLS), BLOCKS)
    block = tl.program_id(0) % strips * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    return (tl.program_id(0) // strips).to(tl.int64) * BLOCK_ROWS, block * BLOCK_COLS


@triton.jit
def inside(row, col, top, left, rows, cols, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, UNIT: tl.constexpr):
    return (row < tl.minimum(rows - top, BLOCK_ROWS)) & (col < BLOCK_COLS // UNIT) & (left // UNIT + col < cols // UNIT)


@triton.jit
def load_slices(
    matrix,
    top,
    left,
    rows,
    cols,
    stride_row,
    stride_col,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    COLS: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The bits of the even and of the odd columns: 16 slices each, uint32 ``[BLOCKS, WIDTH / 2]``.

    The entries are int16 or int32; with ``UNIT`` 2, ``matrix`` is of pairs of 16 bits and so is the row stride.
    """
    evens, odds = (), ()
    for s in tl.static_range(16):
        row, col = place(s, COLS // UNIT, WIDTH // UNIT)
        at = matrix + (top + row) * stride_row + (left // UNIT + col).to(tl.int64) * stride_col
        if WHOLE:
            entries = tl.load(at)
        else:
            entries = tl.load(at, inside(row, col, top, left, rows, cols, BLOCK_ROWS, BLOCK_COLS, UNIT), 0)
        if UNIT == 2:
            word = entries.to(tl.uint32)
            even, odd = word & 0xFFFF, word >> 16
        else:
            even, odd = unpairs(entries)
            if entries.dtype == tl.int16:
                even, odd = even.to(tl.uint16), odd.to(tl.uint16)
            even, odd = even.to(tl.uint32), odd.to(tl.uint32)
        evens += (even,)
        odds += (odd,)
    return evens, odds


@triton.jit
def store_mask(
    kept,
    mask,
    top,
    left,
    rows,
    cols,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    COLS: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Stores which entries are kept, of words as of a plane; with ``UNIT`` 4, four bools are one int32."""
    if UNIT == 4:
        quads = quad_bytes(kept)
    for s in tl.static_range(16):
        row, col = place(s, COLS // UNIT, WIDTH // UNIT)
        if UNIT == 4:
            entries = (quads[s // 8] >> (s % 8) & 0x01010101).to(tl.int32)
        else:
            even, odd = has(kept, s)
            entries = pairs(even.to(tl.int8), odd.to(tl.int8))
        at = mask + (top + row) * (cols // UNIT) + left // UNIT + col
        if WHOLE:
            tl.store(at, entries)
        else:
            tl.store(at, entries, inside(row, col, top, left, rows, cols, BLOCK_ROWS, BLOCK_COLS, UNIT))


def as_bits(matrix: Tensor, block_cols: int) -> tuple[Tensor, int]:
    """The entries as integers; two of 16 bits as one where the addresses of all rows and blocks allow, and how many."""
    if matrix.element_size() == 4:
        return matrix.view(torch.int32), 1
    stride_row, stride_col = matrix.stride()
    even = (matrix.shape[1] | stride_row | block_cols | matrix.storage_offset()) % 2 == 0
    if even and stride_col == 1 and matrix.data_ptr() % 4 == 0:
        return matrix.view(torch.int32), 2
    return matrix.view(torch.int16), 1


def program(
    like: Tensor, block_rows: int, block_cols: int, width: int, key_bytes: int, config: Config
) -> tuple[int, dict[str, int]] | None:
    """The grid, and the constants of a program; None where a block is larger than the registers.

    Args:
        width: columns of a slice, at least.
        key_bytes: of a key: a thread holds 16 bytes of keys of a slice.
    """
    rows, cols = like.shape
    padded = max(2, triton.next_power_of_2(block_cols))
    width = max(width, padded * triton.next_power_of_2(block_rows) // 16)
    lanes = 64 if architecture(like).startswith("gfx9") else 32
    row = 16 // key_bytes * lanes  # entries of a slice that a warp holds
    if width > 512 // lanes * row:
        return None
    warps = max(config["num_warps"], width // row)
    across = triton.cdiv(cols, block_cols)
    blocks = min(max(1, row * warps // width), triton.next_power_of_2(across))
    exact = width * 16 == block_rows * block_cols and rows % block_rows == 0 and cols % (block_cols * blocks) == 0
    return triton.cdiv(rows, block_rows) * triton.cdiv(across, blocks), {
        "BLOCK_ROWS": block_rows,
        "BLOCK_COLS": block_cols,
        "COLS": padded,
        "WIDTH": width,
        "BLOCKS": blocks,
        "WHOLE": exact,
        "num_warps": warps,
    }
