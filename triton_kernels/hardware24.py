"""Conversion to the 2:4 layouts of GPU tensor cores, from a dense or a packed weight, and back to packed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Table, on
from ._metadata24 import load_metadata, store_metadata
from ._pairs24 import prune_units, unit_codes
from ._select import keep2of4, magnitude_key, widen
from ._tiles import columns_of_tile, deinterleave, first_last, first_row, interleave, split_groups, tiles

PRUNE = Table(
    "prune_to_hardware24",
    {
        "32x256": {"BLOCK_ROWS": 32, "BLOCK_COLS": 256, "num_warps": 8},
        "32x128": {"BLOCK_ROWS": 32, "BLOCK_COLS": 128, "num_warps": 4},
        "64x128": {"BLOCK_ROWS": 64, "BLOCK_COLS": 128, "num_warps": 4},
    },
    {"any": "32x256"},
)
CONVERT = Table("to_hardware24", PRUNE.configs, {"any": "32x256"})


@triton.jit
def _codes(k0, k1, k2, k3):
    """Returns the same as ``unit_codes``, from bools ``[R, C / 4]`` that tell which entries of a group are kept."""
    first, _ = first_last(k0, k1, k2, k3, 0, 1, 2, 3)
    _, last = first_last(k0, k1, k2, k3, 0, 4, 8, 12)
    even, odd = deinterleave((first | last).to(tl.uint32))
    return even | odd << 16


@triton.jit
def _prune_to_hardware24_kernel(
    weight,
    scale,
    values,
    metadata,
    rows,
    cols,
    weight_row,
    weight_col,
    LAYOUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    first_of_tile = first_row(BLOCK_ROWS)
    row = first_of_tile + tl.arange(0, BLOCK_ROWS)[:, None]
    col = columns_of_tile(BLOCK_COLS, 8)
    inside = (row < rows) & (col < cols)
    entries = tl.load(weight + row * weight_row + col.to(tl.int64) * weight_col, inside, 0)
    if scale is None:
        kept, k0, k1, k2, k3 = prune_units(entries)
        word = columns_of_tile(BLOCK_COLS // 4, 2)
        words = values.to(tl.pointer_type(tl.uint32), bitcast=True)
        tl.store(words + row * (cols // 4) + word, kept, (row < rows) & (word < cols // 4))
        units = unit_codes(k0, k1, k2, k3)
    else:
        score = tl.abs(widen(entries)) * tl.load(scale + col, col < cols, 0)
        k0, k1, k2, k3 = split_groups(magnitude_key(score))
        k0, k1, k2, k3 = keep2of4(k0, k1, k2, k3)
        e0, e1, e2, e3 = split_groups(entries)
        first, last = first_last(k0, k1, k2, k3, e0, e1, e2, e3)
        value = columns_of_tile(BLOCK_COLS // 2, 4)
        tl.store(values + row * (cols // 2) + value, interleave(first, last), (row < rows) & (value < cols // 2))
        units = _codes(k0, k1, k2, k3)
    store_metadata(metadata, units, first_of_tile, tl.program_id(0) * (BLOCK_COLS // 32), rows, cols, LAYOUT)


@triton.jit
def _to_hardware24_kernel(
    values,
    bitmask,
    packed,
    metadata,
    rows,
    cols,
    values_row,
    values_col,
    bitmask_row,
    bitmask_col,
    LAYOUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    first_of_tile = first_row(BLOCK_ROWS)
    row = first_of_tile + tl.arange(0, BLOCK_ROWS)[:, None]
    value = columns_of_tile(BLOCK_COLS // 2, 8)
    inside = (row < rows) & (value < cols // 2)
    kept = tl.load(values + row * values_row + value.to(tl.int64) * values_col, inside, 0)
    tl.store(packed + row * (cols // 2) + value, kept, inside)
    byte = columns_of_tile(BLOCK_COLS // 8, 8)
    inside = (row < rows) & (byte < cols // 8)
    bits = tl.load(bitmask + row * bitmask_row + byte.to(tl.int64) * bitmask_col, inside, 0).to(tl.int32)
    bits = interleave(bits & 15, bits >> 4)
    b0, b1, b2, b3 = (bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0, (bits & 8) != 0
    units = _codes(b0, b1, b2, b3)
    store_metadata(metadata, units, first_of_tile, tl.program_id(0) * (BLOCK_COLS // 32), rows, cols, LAYOUT)


@triton.jit
def _from_hardware24_kernel(
    packed,
    metadata,
    values,
    bitmask,
    rows,
    cols,
    LAYOUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    first_of_tile = first_row(BLOCK_ROWS)
    row = first_of_tile + tl.arange(0, BLOCK_ROWS)[:, None]
    value = columns_of_tile(BLOCK_COLS // 2, 8)
    inside = (row < rows) & (value < cols // 2)
    kept = tl.load(packed + row * (cols // 2) + value, inside, 0)
    tl.store(values + row * (cols // 2) + value, kept, inside)
    block = tl.program_id(0) * (BLOCK_COLS // 32)
    even, odd = load_metadata(metadata, first_of_tile, block, rows, cols, BLOCK_ROWS, BLOCK_COLS // 32, LAYOUT)
    low = 1 << (even & 3) | 1 << (even >> 2)
    high = 1 << (odd & 3) | 1 << (odd >> 2)
    byte = columns_of_tile(BLOCK_COLS // 8, 8)
    tl.store(bitmask + row * (cols // 8) + byte, (low | high << 4).to(tl.uint8), (row < rows) & (byte < cols // 8))


def _halves(packed: Tensor, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """Splits a packed weight into its values and its metadata, as words of 32 bits."""
    return packed, packed[rows * cols // 2 :].view(torch.int32)


def to_hardware24(values: Tensor, bitmask: Tensor, cols: int, layout: str) -> Tensor:
    rows = values.shape[0]
    packed = values.new_empty(rows * cols // 16 * 9)
    if packed.numel() == 0:
        return packed
    config = CONVERT.config(values, "any")
    with on(values):
        _to_hardware24_kernel[tiles(rows, cols, config)](
            values,
            bitmask,
            *_halves(packed, rows, cols),
            rows,
            cols,
            *values.stride(),
            *bitmask.stride(),
            LAYOUT=layout,
            **config,
        )
    return packed


def from_hardware24(packed: Tensor, rows: int, cols: int, layout: str) -> tuple[Tensor, Tensor]:
    values = packed.new_empty(rows, cols // 2)
    bitmask = packed.new_empty(rows, cols // 8, dtype=torch.uint8)
    if packed.numel() == 0:
        return values, bitmask
    packed = packed.contiguous()
    if packed.storage_offset() % 2:  # the metadata is read in words of 32 bits
        packed = packed.clone()
    config = CONVERT.config(values, "any")
    with on(packed):
        _from_hardware24_kernel[tiles(rows, cols, config)](
            *_halves(packed, rows, cols), values, bitmask, rows, cols, LAYOUT=layout, **config
        )
    return values, bitmask


def prune_to_hardware24(weight: Tensor, scale: Tensor | None, layout: str) -> Tensor:
    rows, cols = weight.shape
    packed = weight.new_empty(rows * cols // 16 * 9)
    if packed.numel() == 0:
        return packed
    config = PRUNE.config(weight, "any")
    with on(weight):
        _prune_to_hardware24_kernel[tiles(rows, cols, config)](
            weight,
            None if scale is None else scale.contiguous(),
            *_halves(packed, rows, cols),
            rows,
            cols,
            *weight.stride(),
            LAYOUT=layout,
            **config,
        )
    return packed
