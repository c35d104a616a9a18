"""Tiles of a matrix, and the groups of four in them: what packing kernels share."""

import triton
import triton.language as tl

from ._launch import Config

MOST = 65535  # programs along the second axis of a grid


def tiles(rows: int, cols: int, config: Config) -> tuple[int, int, int]:
    """The grid of a kernel's tiles: columns, then rows, which take a third axis where the second ends."""
    down = triton.cdiv(rows, config["BLOCK_ROWS"])
    layers = triton.cdiv(down, MOST)
    return triton.cdiv(cols, config["BLOCK_COLS"]), triton.cdiv(down, layers), layers


@triton.jit
def first_row(BLOCK_ROWS: tl.constexpr):
    """The first row of this program's tile, int64; it may lie past the matrix."""
    return (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * BLOCK_ROWS


@triton.jit
def row_of(tile_columns: tl.constexpr, vector: tl.constexpr):
    """``[1, tile_columns]``: the columns of this program's tile, stored ``vector`` at a time by a thread.

    Where a thread has fewer columns than the widest store, a wider one would send the tile through shared memory.
    """
    col = tl.program_id(0) * tile_columns + tl.arange(0, tile_columns)[None, :]
    return tl.max_contiguous(col, [1, vector])


@triton.jit
def quads(tile):
    """``[R, C]`` to its four columns of groups, ``[R, C / 4]`` each: the entries of a group share a thread."""
    rows: tl.constexpr = tile.shape[0]
    groups: tl.constexpr = tile.shape[1] // 4
    even, odd = tl.split(tl.reshape(tile, [rows, groups, 2, 2]))
    e0, e2 = tl.split(even)
    e1, e3 = tl.split(odd)
    return e0, e1, e2, e3


@triton.jit
def unquads(e0, e1, e2, e3):
    """The tile ``[R, C]`` of ``quads``."""
    tile = tl.join(tl.join(e0, e2), tl.join(e1, e3))
    return tl.reshape(tile, [e0.shape[0], 4 * e0.shape[1]])


@triton.jit
def pairs(first, last):
    """``[R, G]`` twice to ``[R, 2 G]``, in turns."""
    return tl.reshape(tl.join(first, last), [first.shape[0], 2 * first.shape[1]])


@triton.jit
def unpairs(tile):
    """The two ``[R, G]`` of ``pairs``."""
    return tl.split(tl.reshape(tile, [tile.shape[0], tile.shape[1] // 2, 2]))


@triton.jit
def first_last(k0, k1, k2, k3, e0, e1, e2, e3):
    """The entries of the first and the last that are kept of a group of which two are.

    Fewer than two are completed by the rule of ``torch.sparse``'s semi-structured conversion.
    """
    first = tl.where(k0, e0, tl.where(k1, e1, e2))
    last = tl.where(k0 & k1, e1, tl.where((k0 | k1) & ~k3, e2, e3))
    return first, last
