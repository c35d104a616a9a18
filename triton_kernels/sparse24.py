"""Packs and unpacks the 2:4 format; ``prune_pack24`` also selects what to keep, in the same pass over the weight."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Table, on
from ._pairs24 import prune_units, unit_bits
from ._select import keep2of4, magnitude_key, widen
from ._tiles import columns_of_tile, deinterleave, first_last, first_row, interleave, join_groups, split_groups, tiles

_NO_FAULT = 2**63 - 1
# A thread takes eight columns of a row at a time: 16 bytes of 16-bit weights, 8 of values and one of the bitmask.
PACK = Table(
    "pack24",
    {
        "8x256": {"BLOCK_ROWS": 8, "BLOCK_COLS": 256, "num_warps": 8},
        "4x256": {"BLOCK_ROWS": 4, "BLOCK_COLS": 256, "num_warps": 4},
        "16x256": {"BLOCK_ROWS": 16, "BLOCK_COLS": 256, "num_warps": 8},
        "32x256": {"BLOCK_ROWS": 32, "BLOCK_COLS": 256, "num_warps": 8},
    },
    {"any": "16x256"},
)


@triton.jit
def _pack24_kernel(
    weight,
    mask,
    scale,
    values,
    bitmask,
    fault,
    rows,
    cols,
    weight_row,
    weight_col,
    mask_row,
    mask_col,
    values_cols,
    bitmask_cols,
    PRUNE: tl.constexpr,
    RAGGED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    row = first_row(BLOCK_ROWS) + tl.arange(0, BLOCK_ROWS)[:, None]
    col = columns_of_tile(BLOCK_COLS, 8)
    group = columns_of_tile(BLOCK_COLS // 4, 1)
    inside = (row < rows) & (col < cols)
    entries = tl.load(weight + row * weight_row + col.to(tl.int64) * weight_col, inside, 0)
    if mask is not None:
        kept = tl.load(mask + row * mask_row + col.to(tl.int64) * mask_col, inside, 0).to(tl.int32)
    elif PRUNE:
        score = widen(entries)
        if scale is not None:
            score = tl.abs(score) * tl.load(scale + col, col < cols, 0)
        kept = magnitude_key(score)
    else:
        kept = widen(entries).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    k0, k1, k2, k3 = split_groups(kept)
    if PRUNE:
        k0, k1, k2, k3 = keep2of4(k0, k1, k2, k3)
    else:
        k0, k1, k2, k3 = k0 != 0, k1 != 0, k2 != 0, k3 != 0
    if fault is not None:
        count = k0.to(tl.int32) + k1 + k2 + k3
        wrong = (count != 2) if mask is not None else (count > 2)
        wrong = wrong & (row < rows) & (4 * group + 4 <= cols)
        where = (row * (cols // 4) + group) * 8 + count
        tl.atomic_min(fault, tl.min(tl.where(wrong, where, 2**63 - 1)))
    if RAGGED:  # a tail is kept whole
        tail = 4 * group + 4 > cols
        k0, k1 = k0 | tail, k1 | tail
    e0, e1, e2, e3 = split_groups(entries)
    first, last = first_last(k0, k1, k2, k3, e0, e1, e2, e3)
    one, two = first_last(k0, k1, k2, k3, 1, 2, 4, 8)
    bits = one | two
    value = columns_of_tile(BLOCK_COLS // 2, 64 // values.dtype.element_ty.primitive_bitwidth)
    stored = values_cols
    if RAGGED:
        bits = tl.where(tail, 15 >> tl.minimum(4 * group + 4 - cols, 4), bits)
        stored = tl.minimum(values_cols, tl.cdiv(cols, 4) * 2)
        third = 2 * group + 2
        tl.store(values + row * values_cols + third, e2, (row < rows) & tail & (third < values_cols))
    tl.store(values + row * values_cols + value, interleave(first, last), (row < rows) & (value < stored))
    low, high = deinterleave(bits)
    byte = columns_of_tile(BLOCK_COLS // 8, 1)
    inside = (row < rows) & (byte < bitmask_cols)
    tl.store(bitmask + row * bitmask_cols + byte, (low | high << 4).to(tl.uint8), inside)


@triton.jit
def _prune_pack24_kernel(
    weight,
    values,
    bitmask,
    rows,
    cols,
    weight_row,
    weight_col,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Prunes and packs 16-bit weights, ranked by magnitude, whose columns are a multiple of eight."""
    row = first_row(BLOCK_ROWS) + tl.arange(0, BLOCK_ROWS)[:, None]
    col = columns_of_tile(BLOCK_COLS, 8)
    inside = (row < rows) & (col < cols)
    entries = tl.load(weight + row * weight_row + col.to(tl.int64) * weight_col, inside, 0)
    kept, k0, k1, k2, k3 = prune_units(entries)
    word = columns_of_tile(BLOCK_COLS // 4, 2)
    words = values.to(tl.pointer_type(tl.uint32), bitcast=True)
    tl.store(words + row * (cols // 4) + word, kept, (row < rows) & (word < cols // 4))
    byte = columns_of_tile(BLOCK_COLS // 8, 1)
    tl.store(bitmask + row * (cols // 8) + byte, unit_bits(k0, k1, k2, k3), (row < rows) & (byte < cols // 8))


@triton.jit
def _unpack24_kernel(
    values,
    bitmask,
    weight,
    rows,
    cols,
    values_row,
    values_col,
    values_cols,
    bitmask_row,
    bitmask_col,
    bitmask_cols,
    RAGGED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    row = first_row(BLOCK_ROWS) + tl.arange(0, BLOCK_ROWS)[:, None]
    value = columns_of_tile(BLOCK_COLS // 2, 64 // values.dtype.element_ty.primitive_bitwidth)
    from_row = values + row * values_row
    kept = tl.load(from_row + value.to(tl.int64) * values_col, (row < rows) & (value < values_cols), 0)
    first, last = deinterleave(kept)
    byte = columns_of_tile(BLOCK_COLS // 8, 1)
    inside = (row < rows) & (byte < bitmask_cols)
    bits = tl.load(bitmask + row * bitmask_row + byte.to(tl.int64) * bitmask_col, inside, 0).to(tl.int32)
    bits = interleave(bits & 15, bits >> 4)
    b0, b1, b2, b3 = (bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0, (bits & 8) != 0
    third = tl.where(b3, first, last)
    if RAGGED:  # a tail is stored whole
        group = columns_of_tile(BLOCK_COLS // 4, 1)
        inside = (row < rows) & (4 * group + 3 == cols)
        third = tl.where(inside, tl.load(from_row + (2 * group + 2).to(tl.int64) * values_col, inside, 0), third)
    zero = tl.zeros_like(first)
    tile = join_groups(
        tl.where(b0, first, zero),
        tl.where(b1, tl.where(b0, last, first), zero),
        tl.where(b2, third, zero),
        tl.where(b3, last, zero),
    )
    col = columns_of_tile(BLOCK_COLS, 8)
    tl.store(weight + row * cols + col, tile, (row < rows) & (col < cols))


def pack24(weight: Tensor, mask: Tensor | None, check: bool) -> tuple[Tensor, Tensor]:
    fault = torch.full((1,), _NO_FAULT, dtype=torch.int64, device=weight.device) if check else None
    packed = _pack(weight, mask, None, prune=False, fault=fault)
    if fault is not None and (first := int(fault)) != _NO_FAULT:  # waits for the device, as asked for
        index, count = divmod(first, 8)
        row, group = divmod(index, weight.shape[1] // 4)
        raise ValueError(
            f"pack24: row {row}, columns {4 * group} to {4 * group + 3} have {count} "
            f"{'non-zeros' if mask is None else 'set mask entries'}; "
            f"2:4 needs {'at most' if mask is None else 'exactly'} 2"
        )
    return packed


def prune_pack24(weight: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    return _pack(weight, None, scale, prune=True, fault=None)


def _pack(
    weight: Tensor, mask: Tensor | None, scale: Tensor | None, prune: bool, fault: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows, cols = weight.shape
    values = weight.new_empty(rows, 2 * (cols // 4) + cols % 4)
    bitmask = weight.new_empty(rows, -(-cols // 8), dtype=torch.uint8)
    if weight.numel() == 0:
        return values, bitmask
    config = PACK.config(weight, "any")
    with on(weight):
        if prune and scale is None and weight.dtype != torch.float32 and cols % 8 == 0:
            _prune_pack24_kernel[tiles(rows, cols, config)](
                weight, values, bitmask, rows, cols, *weight.stride(), **config
            )
            return values, bitmask
        _pack24_kernel[tiles(rows, cols, config)](
            weight,
            mask,
            None if scale is None else scale.contiguous(),
            values,
            bitmask,
            fault,
            rows,
            cols,
            *weight.stride(),
            *((0, 0) if mask is None else mask.stride()),
            values.shape[1],
            bitmask.shape[1],
            PRUNE=prune,
            RAGGED=cols % 8 != 0,
            **config,
        )
    return values, bitmask


def unpack24(values: Tensor, bitmask: Tensor, cols: int) -> Tensor:
    rows = values.shape[0]
    weight = values.new_empty(rows, cols)
    if weight.numel() == 0:
        return weight
    config = PACK.config(values, "any")
    with on(values):
        _unpack24_kernel[tiles(rows, cols, config)](
            values,
            bitmask,
            weight,
            rows,
            cols,
            *values.stride(),
            values.shape[1],
            *bitmask.stride(),
            bitmask.shape[1],
            RAGGED=cols % 8 != 0,
            **config,
        )
    return weight
