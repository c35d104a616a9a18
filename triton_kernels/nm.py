"""N:M masks, as bools or as bits, and N:M pruning, which writes the weight and its mask in one pass."""

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _nm24, _select
from ._launch import Table, on

TILES = Table(
    "nm_tiles",
    {
        "2x1024": {"BLOCK": 2048, "COLS": 1024, "num_warps": 4},
        "4x1024": {"BLOCK": 4096, "COLS": 1024, "num_warps": 4},
        "8x512": {"BLOCK": 4096, "COLS": 512, "num_warps": 4},
        "8x1024": {"BLOCK": 8192, "COLS": 1024, "num_warps": 4},
    },
    default={"small": "2x1024", "large": "4x1024"},
)


@triton.jit
def _loses(key, index, other, other_index):
    """Returns 1 where ``key`` is smaller than ``other``, or equal and later, else 0."""
    # Keys are not negative, so the sign of their difference compares them.
    return ((key - other - (other_index < index).to(tl.int32)) >> 31) & 1


@triton.jit(do_not_specialize=["rows", "units", "tiles"])
def _nm_kernel(
    x_ptr,
    scale_ptr,
    mask_ptr,
    bits_ptr,
    pruned_ptr,
    rows,
    units,
    tiles,
    UNIT: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Keeps N of M in a tile of a matrix.

    The matrix has ``units * UNIT`` columns, so that ``UNIT`` tells the compiler how rows are aligned, and is ``tiles``
    tiles wide.
    """
    cols = units.to(tl.int64) * UNIT
    row0 = (tl.program_id(0) // tiles).to(tl.int64) * ROWS
    col0 = (tl.program_id(0) % tiles).to(tl.int64) * COLS
    row = tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLS)[None, :]
    inside_cols = col < tl.minimum(cols - col0, COLS).to(tl.int32)
    inside = (row < tl.minimum(rows - row0, ROWS).to(tl.int32)) & inside_cols
    start = row0 * cols + col0
    offset = row.to(tl.int64) * cols + col
    x = tl.load(x_ptr + start + offset, mask=inside, other=0.0)
    scale = None
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + col0 + col, mask=inside_cols, other=0.0)
    key = _select.score_key(x, scale)

    if N == 2 and M == 4:
        k0, k1, k2, k3 = _select.split4(tl.reshape(key, [ROWS * COLS]))
        b0, b1, b2, b3 = _select.keep2of4(k0, k1, k2, k3)
        keep = tl.reshape(_select.join4(b0, b1, b2, b3), [ROWS, COLS])
    elif M & (M - 1) == 0:
        key = tl.reshape(key, [ROWS * COLS // M, M])
        index = tl.arange(0, M)[None, :]
        losses = tl.zeros_like(key)
        for j in tl.static_range(M):
            other = tl.sum(tl.where(index == j, key, 0), 1, keep_dims=True)
            losses += _loses(key, index, other, j)
        keep = tl.reshape(losses < N, [ROWS, COLS])
    else:  # groups cross threads and tiles: every entry loads its whole group, from the cache
        index = (col + (col0 % M).to(tl.int32)) % M
        losses = tl.zeros_like(key)
        for j in tl.static_range(M):
            other = col - index + j
            inside_other = other < tl.minimum(cols - col0, COLS + M).to(tl.int32)
            entry = tl.load(x_ptr + start + offset - col + other, mask=inside & inside_other, other=0.0)
            if scale_ptr is not None:
                scale = tl.load(scale_ptr + col0 + other, mask=inside_cols & inside_other, other=0.0)
            losses += _loses(key, index, _select.score_key(entry, scale), j)
        keep = losses < N
    if UNIT % M != 0:
        keep = keep | (col >= (cols // M * M - col0))  # the tail

    if mask_ptr is not None:
        tl.store(mask_ptr + start + offset, keep, mask=inside)
    if bits_ptr is not None:
        bits = tl.reshape((keep & inside).to(tl.int32), [ROWS, COLS // 8, 8]) << tl.arange(0, 8)[None, None, :]
        byte = tl.max_contiguous(tl.arange(0, COLS // 8), 1)[None, :]
        row_bytes = tl.cdiv(cols, 8)
        inside = (row < tl.minimum(rows - row0, ROWS).to(tl.int32)) & (byte * 8 < tl.minimum(cols - col0, COLS))
        offset = row.to(tl.int64) * row_bytes + byte
        tl.store(bits_ptr + row0 * row_bytes + col0 // 8 + offset, tl.sum(bits, 2).to(tl.uint8), mask=inside)
    if pruned_ptr is not None:
        tl.store(pruned_ptr + start + offset, tl.where(keep, x, 0.0), mask=inside)


def _launch(
    x: Tensor,
    n: int,
    m: int,
    *,
    scale: Tensor | None = None,
    mask: Tensor | None = None,
    bits: Tensor | None = None,
    pruned: Tensor | None = None,
) -> None:
    """Writes the outputs that are not None for a contiguous ``x``; ``pruned`` may be ``x`` itself."""
    if x.numel() == 0:
        return
    cols = x.shape[-1]
    rows = x.numel() // cols
    if scale is None and cols % m == 0 and (bits is None or cols % 8 == 0):  # no group or byte crosses the end of a row
        rows, cols = 1, x.numel()
    with on(x):
        if (n, m) == (2, 4) and _nm24.fits(x, cols):
            if scale is None:
                return _nm24.by_magnitude(x, mask, bits, pruned)
            return _nm24.scaled(x, scale, mask, pruned)
        config = _nm24.halve_warps_on_amd(TILES.config(x, _nm24.size_class(x)), x)
        block, widest = config.pop("BLOCK"), config.pop("COLS")
        widest = block if rows == 1 else widest
        config["COLS"] = max(min(triton.next_power_of_2(cols), widest), triton.next_power_of_2(m), 8)
        config["ROWS"] = block // config["COLS"]
        unit = gcd(cols, 32)
        tiles = triton.cdiv(cols, config["COLS"])
        grid = (triton.cdiv(rows, config["ROWS"]) * tiles,)
        _nm_kernel[grid](
            x,
            scale,
            mask,
            bits,
            pruned,
            rows,
            cols // unit,
            tiles,
            UNIT=unit,
            N=n,
            M=m,
            enable_fp_fusion=False,
            **config,
        )


def nm_mask(score: Tensor, n: int, m: int) -> Tensor:
    mask = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    _launch(score.contiguous(), n, m, mask=mask)
    return mask


def nm_mask_bits(score: Tensor, n: int, m: int) -> Tensor:
    bits = torch.empty((*score.shape[:-1], triton.cdiv(score.shape[-1], 8)), dtype=torch.uint8, device=score.device)
    _launch(score.contiguous(), n, m, bits=bits)
    return bits


def nm_prune(weight: Tensor, n: int, m: int, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    pruned = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    scale = None if scale is None else scale.contiguous()
    _launch(weight.contiguous(), n, m, scale=scale, mask=mask, pruned=pruned)
    return pruned, mask


def nm_prune_(weight: Tensor, n: int, m: int, scale: Tensor | None) -> Tensor:
    if not weight.is_contiguous() or m & (m - 1):  # for other m the kernel reads entries of other tiles
        pruned, mask = nm_prune(weight, n, m, scale)
        weight.copy_(pruned)
        return mask
    mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    _launch(weight, n, m, scale=None if scale is None else scale.contiguous(), mask=mask, pruned=weight)
    return mask
