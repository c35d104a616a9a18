"""Where the entries of a program's strip of blocks are, as 16 slices (see ``_planes``), and how it stores its mask."""

import triton
import triton.language as tl
from torch import Tensor

from ._launch import Config, architecture
from ._planes import quad_bytes, spread


@triton.jit
def blocks_of(cols, BLOCK_COLS: tl.constexpr, BLOCKS: tl.constexpr):
    """The row of blocks of this program, int64, and its blocks, which lie side by side: ``[1, BLOCKS, 1]``."""
    strips = tl.cdiv(tl.cdiv(cols, BLOCK_COLS), BLOCKS)
    block = tl.program_id(0) % strips * BLOCKS + tl.arange(0, BLOCKS)[None, :, None]
    return (tl.program_id(0) // strips).to(tl.int64), block


@triton.jit
def place(
    rows,
    cols,
    SLICES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    COLS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    VECTOR: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The rows, int64, and the columns of the entries in the matrix, and which are inside: ``[SLICES, BLOCKS, WIDTH]``.

    Blocks of ``BLOCK_COLS`` columns are padded to ``COLS``. A thread takes ``VECTOR`` columns at a time: with as many
    as the widest access has, it would have to trade entries with its neighbors. If ``WHOLE``, all are inside.
    """
    block_row, block = blocks_of(cols, BLOCK_COLS, BLOCKS)
    entry = tl.arange(0, SLICES)[:, None, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    below, beside = entry // COLS, tl.max_contiguous(entry % COLS, [1, 1, VECTOR if VECTOR < COLS else COLS])
    row, col = block_row * BLOCK_ROWS + below, block * BLOCK_COLS + beside
    if WHOLE:
        inside = tl.full([SLICES, BLOCKS, WIDTH], 1, tl.int1)
    else:
        inside = (below < BLOCK_ROWS) & (row < rows) & (beside < BLOCK_COLS) & (col < cols)
    return row, col, inside


@triton.jit
def store_mask(
    kept,
    mask,
    rows,
    cols,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    COLS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    VECTOR: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Stores which entries are kept, of words as of a plane, to a contiguous mask: of int8, or of int32 for four."""
    if mask.dtype.element_ty == tl.int32:
        unit: tl.constexpr = 4
        bools = quad_bytes(kept)
    else:
        unit: tl.constexpr = 1
        bools = (spread(kept) & 1).to(tl.int8)
    row, col, inside = place(
        rows,
        cols // unit,
        16,
        BLOCK_ROWS,
        BLOCK_COLS // unit,
        COLS // unit,
        WIDTH // unit,
        BLOCKS,
        VECTOR // unit,
        WHOLE,
    )
    tl.store(mask + row * (cols // unit) + col, bools, inside)


def warp_lanes(tensor: Tensor) -> int:
    return 64 if architecture(tensor).startswith("gfx9") else 32


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
    vector = 16 // key_bytes
    lanes = warp_lanes(like)
    if width > 512 * vector:
        return None
    warps = max(config["num_warps"], width // (vector * lanes))
    across = triton.cdiv(cols, block_cols)
    blocks = min(max(1, vector * lanes * warps // width), triton.next_power_of_2(across))
    exact = width * 16 == block_rows * block_cols and rows % block_rows == 0 and cols % (block_cols * blocks) == 0
    return triton.cdiv(rows, block_rows) * triton.cdiv(across, blocks), {
        "BLOCK_ROWS": block_rows,
        "BLOCK_COLS": block_cols,
        "COLS": padded,
        "WIDTH": width,
        "BLOCKS": blocks,
        "VECTOR": vector,
        "WHOLE": exact,
        "num_warps": warps,
    }
