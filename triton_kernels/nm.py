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
SCALED = Table(
    "nm_scaled",
    {
        "2x1024": {"BLOCK": 2048, "UNITS": 128, "num_warps": 4},
        "4x1024": {"BLOCK": 4096, "UNITS": 128, "num_warps": 4},
        "8x1024": {"BLOCK": 8192, "UNITS": 128, "num_warps": 4},
        "4x2048": {"BLOCK": 8192, "UNITS": 256, "num_warps": 8},
    },
    default={"small": "2x1024", "large": "4x1024"},
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
def _halves(word, BF16: tl.constexpr):
    """fp32 of the two 16-bit entries of a word."""
    if BF16:
        return (word << 16).to(tl.float32, bitcast=True), (word & 0xFFFF0000).to(tl.float32, bitcast=True)
    low, high = (word & 0xFFFF).to(tl.uint16), (word >> 16).to(tl.uint16)
    return low.to(tl.float16, bitcast=True).to(tl.float32), high.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _keep_scaled(low, high, scale, BF16: tl.constexpr):
    """The mask of a group in two words, as a word of four bytes and as the two words of halves that are kept."""
    s0, s1, s2, s3 = _select.split4(tl.reshape(scale, [4 * scale.shape[0]]))
    x0, x1 = _halves(low, BF16)
    x2, x3 = _halves(high, BF16)
    k0, k1, k2, k3 = _select.keep2of4_signs(
        _keys(x0, s0[None, :]), _keys(x1, s1[None, :]), _keys(x2, s2[None, :]), _keys(x3, s3[None, :])
    )
    k0, k1, k2, k3 = k0 >> 31, k1 >> 31, k2 >> 31, k3 >> 31
    mask = (k0 & 0x00000001) | (k1 & 0x00000100) | (k2 & 0x00010000) | (k3 & 0x01000000)
    return mask, (k0 & 0xFFFF) | (k1 << 16), (k2 & 0xFFFF) | (k3 << 16)


@triton.jit
def _nm24_scaled_kernel(
    x_ptr,
    scale_ptr,
    mask_ptr,
    pruned_ptr,
    rows,
    units,
    BF16: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """2:4 of 16-bit entries times a scale per column, in units as above: a thread reads its scales once for all rows."""
    tiles = tl.cdiv(units, UNITS)
    row0 = (tl.program_id(0) // tiles).to(tl.int64) * ROWS
    unit0 = tl.program_id(0) % tiles * UNITS
    start = row0 * units + unit0
    row = tl.arange(0, ROWS)[:, None]
    inside_rows = row < tl.minimum(rows - row0, ROWS).to(tl.int32)
    left = units - unit0
    word = tl.arange(0, 4 * UNITS)[None, :]
    offset = row.to(tl.int64) * units * 4 + word
    inside = inside_rows & (word < 4 * left)
    words = x_ptr.to(tl.pointer_type(tl.uint32), bitcast=True) + 4 * start
    x = tl.load(words + offset, mask=inside, other=0)
    even, odd = tl.split(tl.reshape(x, [ROWS, UNITS, 2, 2]))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    # In two parts of 16 bytes, so that the thread that reads a unit reads its scales.
    unit = tl.arange(0, UNITS)[:, None]
    scales = scale_ptr + unit0 * 8 + unit * 8 + tl.arange(0, 4)[None, :]
    first_mask, k0, k1 = _keep_scaled(w0, w1, tl.load(scales, mask=unit < left, other=0.0), BF16)
    second_mask, k2, k3 = _keep_scaled(w2, w3, tl.load(scales + 4, mask=unit < left, other=0.0), BF16)
    row = row[:, :, None]
    pair = (tl.arange(0, UNITS)[:, None] * 2 + tl.arange(0, 2)[None, :])[None, :, :]
    masks = mask_ptr.to(tl.pointer_type(tl.uint32), bitcast=True) + 2 * start
    inside_rows = inside_rows[:, :, None]
    tl.store(
        masks + row.to(tl.int64) * units * 2 + pair,
        tl.join(first_mask, second_mask),
        mask=inside_rows & (pair < 2 * left),
    )
    w0, w1, w2, w3 = w0 & k0, w1 & k1, w2 & k2, w3 & k3
    x = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [ROWS, 4 * UNITS])
    words = pruned_ptr.to(tl.pointer_type(tl.uint32), bitcast=True) + 4 * start
    tl.store(words + offset, x, mask=inside)


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
        if (n, m) == (2, 4) and scale is not None and x.dtype in NANS and cols % 8 == 0 and x.data_ptr() % 16 == 0:
            config = dict(SCALED.config(x, size))
            block, units = config.pop("BLOCK") // 8, cols // 8
            config["UNITS"] = min(triton.next_power_of_2(units), config["UNITS"])
            config["ROWS"] = block // config["UNITS"]
            grid = (triton.cdiv(rows, config["ROWS"]) * triton.cdiv(units, config["UNITS"]),)
            _nm24_scaled_kernel[grid](x, scale, mask, pruned, rows, units, BF16=x.dtype == torch.bfloat16, **config)
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
