"""Tiles of a matrix and their groups of four columns: device functions that the packing kernels share."""

import triton
import triton.language as tl

from ._launch import Config

MOST_PROGRAMS = 65535  # CUDA's limit of programs along the second and the third axis of a grid


def tiles(rows: int, cols: int, config: Config) -> tuple[int, int, int]:
    """Returns the grid of a kernel's tiles: columns, then rows on the second axis and, beyond its limit, the third."""
    down = triton.cdiv(rows, config["BLOCK_ROWS"])
    layers = triton.cdiv(down, MOST_PROGRAMS)
    return triton.cdiv(cols, config["BLOCK_COLS"]), triton.cdiv(down, layers), layers


@triton.jit
def first_row(BLOCK_ROWS: tl.constexpr):
    """Returns the first row of this program's tile, int64; it may lie below the end of the matrix."""
    return (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * BLOCK_ROWS


@triton.jit
def columns_of_tile(tile_columns: tl.constexpr, vector: tl.constexpr):
    """Returns the columns of this program's tile, ``[1, tile_columns]``; a thread stores ``vector`` of them at once.

    Wider stores than what a thread holds would send the tile through shared memory.
    """
    col = tl.program_id(0) * tile_columns + tl.arange(0, tile_columns)[None, :]
    return tl.max_contiguous(col, [1, vector])


@triton.jit
def split_groups(tile):
    """Splits a tile ``[R, C]`` into the four entries of its groups, ``[R, C / 4]`` each; none leaves its thread."""
    rows: tl.constexpr = tile.shape[0]
    groups: tl.constexpr = tile.shape[1] // 4
    even, odd = tl.split(tl.reshape(tile, [rows, groups, 2, 2]))
    e0, e2 = tl.split(even)
    e1, e3 = tl.split(odd)
    return e0, e1, e2, e3


@triton.jit
def join_groups(e0, e1, e2, e3):
    """Joins the four entries of groups, ``[R, C / 4]`` each, to a tile ``[R, C]``: the inverse of ``split_groups``."""
    tile = tl.join(tl.join(e0, e2), tl.join(e1, e3))
    return tl.reshape(tile, [e0.shape[0], 4 * e0.shape[1]])


@triton.jit
def interleave(first, last):
    """Interleaves the columns of two tiles ``[R, G]`` to one ``[R, 2 G]``."""
    return tl.reshape(tl.join(first, last), [first.shape[0], 2 * first.shape[1]])


@triton.jit
def deinterleave(tile):
    """Splits a tile ``[R, 2 G]`` into its even and its odd columns: the inverse of ``interleave``."""
    return tl.split(tl.reshape(tile, [tile.shape[0], tile.shape[1] // 2, 2]))


@triton.jit
def first_last(k0, k1, k2, k3, e0, e1, e2, e3):
    """Returns the first and the last kept entry of groups that keep two.

    In a group that keeps fewer, other entries fill up, by the rule of ``torch.sparse``'s semi-structured conversion.
    """
    first = tl.where(k0, e0, tl.where(k1, e1, e2))
    last = tl.where(k0 & k1, e1, tl.where((k0 | k1) & ~k3, e2, e3))
    return first, last
