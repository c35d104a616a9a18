"""N:M masks as bool and as bits, and pruning fused with the mask."""

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _select
from ._launch import Table, on

# The least magnitude that is a NaN, in both halves of a word.
NANS = {torch.bfloat16: 0x7F817F81, torch.float16: 0x7C017C01}
PAIRS = Table(
    "nm_pairs",
    {
        "2048x4": {"BLOCK": 2048, "num_warps": 4},
        "4096x4": {"BLOCK": 4096, "num_warps": 4},
        "8192x4": {"BLOCK": 8192, "num_warps": 4},
        "8192x8": {"BLOCK": 8192, "num_warps": 8},
    },
    default={"small": "2048x4", "large": "4096x4"},
)
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
LARGE = 1 << 22  # entries from which a tile of 4096 fills every multiprocessor several times


@triton.jit
def _nm24_pairs_kernel(
    x_ptr, mask_ptr, bits_ptr, pruned_ptr, units, NAN: tl.constexpr, BLOCK: tl.constexpr, UNITS: tl.constexpr
):
    """2:4 of 16-bit entries by their own magnitude. A thread's unit is 16 bytes: eight entries, two groups."""
    first = tl.program_id(0).to(tl.int64) * UNITS
    left = tl.minimum(units - first, UNITS).to(tl.int32)
    word = tl.arange(0, 4 * UNITS)
    words = x_ptr.to(tl.pointer_type(tl.uint32), bitcast=True) + 4 * first
    w0, w1, w2, w3 = _select.split4(tl.load(words + word, mask=word < 4 * left, other=0))
    x0, x1 = _select.swap_halves(w0, w2)
    x2, x3 = _select.swap_halves(w1, w3)
    k0, k1, k2, k3 = _select.keep2of4_pairs(x0, x1, x2, x3, NAN)
    # One store per unit: a wider one would need entries of two threads.
    unit = tl.max_contiguous(tl.arange(0, UNITS), 1)
    if mask_ptr is not None:
        low = ((k0 >> 15) & 0x00010001) | ((k1 >> 7) & 0x01000100)
        high = ((k2 >> 15) & 0x00010001) | ((k3 >> 7) & 0x01000100)
        first_group, second_group = _select.swap_halves(low, high)
        pair = tl.arange(0, UNITS)[:, None] * 2 + tl.arange(0, 2)[None, :]
        masks = mask_ptr.to(tl.pointer_type(tl.uint32), bitcast=True) + 2 * first
        tl.store(masks + pair, tl.join(first_group, second_group), mask=pair < 2 * left)
    if bits_ptr is not None:
        low = ((k0 >> 1) & 0x40004000) | (k1 & 0x80008000)
        high = ((k2 >> 1) & 0x40004000) | (k3 & 0x80008000)
        nibbles = ((low >> 2) & 0x30003000) | high
        tl.store(bits_ptr + first + unit, ((nibbles >> 12) | (nibbles >> 24)).to(tl.uint8), mask=unit < left)
    if pruned_ptr is not None:
        x0 &= ((k0 >> 15) & 0x00010001) * 0xFFFF
        x1 &= ((k1 >> 15) & 0x00010001) * 0xFFFF
        x2 &= ((k2 >> 15) & 0x00010001) * 0xFFFF
        x3 &= ((k3 >> 15) & 0x00010001) * 0xFFFF
        w0, w2 = _select.swap_halves(x0, x1)
        w1, w3 = _select.swap_halves(x2, x3)
        words = pruned_ptr.to(tl.pointer_type(tl.uint32), bitcast=True) + 4 * first
        tl.store(words + word, _select.join4(w0, w1, w2, w3), mask=word < 4 * left)


@triton.jit
def _keys(x, scale):
    x = _select.widen(x)
    if scale is not None:
        x = tl.abs(x) * scale
    return _select.magnitude_key(x)


@triton.jit
def _beats(other, other_index, key, index):
    return ((other > key) | ((other == key) & (other_index < index))).to(tl.int32)


@triton.jit
def _nm_kernel(
    x_ptr,
    scale_ptr,
    mask_ptr,
    bits_ptr,
    pruned_ptr,
    rows,
    units,
    UNIT: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """N of M in a tile of a matrix of ``units * UNIT`` columns; UNIT, a power of two, tells how rows are aligned."""
    cols = units * UNIT
    tiles = tl.cdiv(cols, COLS)
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
    key = _keys(x, scale)

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
            losses += _beats(other, j, key, index)
        keep = tl.reshape(losses < N, [ROWS, COLS])
    else:  # groups straddle threads and tiles: every entry reads its whole group, from the cache
        index = (col + (col0 % M).to(tl.int32)) % M
        losses = tl.zeros_like(key)
        for j in tl.static_range(M):
            other = col - index + j
            inside_other = other < tl.minimum(cols - col0, COLS + M).to(tl.int32)
            entry = tl.load(x_ptr + start + offset - col + other, mask=inside & inside_other, other=0.0)
            if scale_ptr is not None:
                scale = tl.load(scale_ptr + col0 + other, mask=inside_cols & inside_other, other=0.0)
            losses += _beats(_keys(entry, scale), j, key, index)
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


def _launch(x: Tensor, n: int, m: int, *, scale: Tensor | None = None, mask=None, bits=None, pruned=None) -> None:
    """Answers from contiguous ``x`` into the outputs that are given; ``pruned`` may be ``x``."""
    if x.numel() == 0:
        return
    cols = x.shape[-1]
    rows = x.numel() // cols
    if scale is None and cols % m == 0 and (bits is None or cols % 8 == 0):  # rows do not matter
        rows, cols = 1, x.numel()
    size = "large" if x.numel() >= LARGE else "small"
    with on(x):
        if (n, m, rows) == (2, 4, 1) and scale is None and x.dtype in NANS and cols % 8 == 0 and x.data_ptr() % 16 == 0:
            config = PAIRS.config(x, size)
            units = cols // 8
            grid = (triton.cdiv(units, config["BLOCK"] // 8),)
            _nm24_pairs_kernel[grid](
                x, mask, bits, pruned, units, NAN=NANS[x.dtype], UNITS=config["BLOCK"] // 8, **config
            )
            return
        unit = gcd(cols, 32)
        config = dict(TILES.config(x, size))
        block = config.pop("BLOCK")
        widest = block if rows == 1 else config.pop("COLS")
        config["COLS"] = max(min(triton.next_power_of_2(cols), widest), triton.next_power_of_2(m), 8)
        config["ROWS"] = block // config["COLS"]
        grid = (triton.cdiv(rows, config["ROWS"]) * triton.cdiv(cols, config["COLS"]),)
        _nm_kernel[grid](x, scale, mask, bits, pruned, rows, cols // unit, UNIT=unit, N=n, M=m, **config)


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
    if not weight.is_contiguous() or m & (m - 1):  # other m read the entries of other tiles
        pruned, mask = nm_prune(weight, n, m, scale)
        weight.copy_(pruned)
        return mask
    mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    _launch(weight, n, m, scale=None if scale is None else scale.contiguous(), mask=mask, pruned=weight)
    return mask
