"""2:4 masks of fp16 and bf16 in whole units, as fast as memory is read and written.

A unit is what a thread reads at once: 16 bytes, which are eight entries, two groups or four words. The entries of a
group stay in one thread.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _select
from ._launch import Config, Table, architecture

# The smallest bit pattern of a NaN without its sign, in both halves of a word.
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
LARGE = 1 << 22  # entries; from here on the larger blocks still fill every multiprocessor several times


def size_class(x: Tensor) -> str:
    """Returns the shape class of ``x`` for the tables."""
    return "large" if x.numel() >= LARGE else "small"


def halve_warps_on_amd(config: Config, x: Tensor) -> Config:
    """Returns a copy of ``config``, with half the warps on AMD's data center GPUs, whose warps have 64 threads."""
    return config | {"num_warps": config["num_warps"] // (2 if architecture(x).startswith("gfx9") else 1)}


def fits(x: Tensor, cols: int) -> bool:
    """Checks whether every row of ``cols`` entries consists of whole units that start at multiples of 16 bytes."""
    return x.dtype in NANS and cols % 8 == 0 and x.data_ptr() % 16 == 0


@triton.jit(do_not_specialize=["units"])
def _nm24_pairs_kernel(x_ptr, mask_ptr, bits_ptr, pruned_ptr, units, NAN: tl.constexpr, UNITS: tl.constexpr):
    """Writes the 2:4 mask, its bits and the pruned entries of 16-bit entries, ranked by magnitude."""
    first = tl.program_id(0).to(tl.int64) * UNITS
    left = tl.minimum(units - first, UNITS).to(tl.int32)
    word = tl.arange(0, 4 * UNITS)
    words = x_ptr.to(tl.pointer_type(tl.uint32), bitcast=True) + 4 * first
    w0, w1, w2, w3 = _select.split4(tl.load(words + word, mask=word < 4 * left, other=0))
    x0, x1 = _select.swap_halves(w0, w2)
    x2, x3 = _select.swap_halves(w1, w3)
    k0, k1, k2, k3 = _select.keep2of4_pairs(x0, x1, x2, x3, NAN)
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
        # The hint hides that bytes are contiguous: the compiler would gather those of two threads for a wider store.
        unit = tl.max_contiguous(tl.arange(0, UNITS), 1)
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
    """Returns the two 16-bit entries of a word in fp32."""
    if BF16:
        return (word << 16).to(tl.float32, bitcast=True), (word & 0xFFFF0000).to(tl.float32, bitcast=True)
    low, high = (word & 0xFFFF).to(tl.uint16), (word >> 16).to(tl.uint16)
    return low.to(tl.float16, bitcast=True).to(tl.float32), high.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _keep_scaled(low, high, scale, BF16: tl.constexpr):
    """Returns the mask of groups of two words: as four bytes of a word, and as two words to ``&`` with the groups."""
    s0, s1, s2, s3 = _select.split4(tl.reshape(scale, [4 * scale.shape[0]]))
    x0, x1 = _halves(low, BF16)
    x2, x3 = _halves(high, BF16)
    k0, k1 = _select.score_key(x0, s0[None, :]), _select.score_key(x1, s1[None, :])
    k2, k3 = _select.score_key(x2, s2[None, :]), _select.score_key(x3, s3[None, :])
    k0, k1, k2, k3 = _select.keep2of4_signs(k0, k1, k2, k3)
    k0, k1, k2, k3 = k0 >> 31, k1 >> 31, k2 >> 31, k3 >> 31
    mask = (k0 & 0x00000001) | (k1 & 0x00000100) | (k2 & 0x00010000) | (k3 & 0x01000000)
    return mask, (k0 & 0xFFFF) | (k1 << 16), (k2 & 0xFFFF) | (k3 << 16)


@triton.jit(do_not_specialize=["rows", "units"])
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
    """Prunes a tile of 16-bit entries to 2:4, ranked by magnitude times a scale per column; scales are read once."""
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
    # The scales are loaded in two parts of 16 bytes, so that a thread loads those of its own unit.
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


def by_magnitude(x: Tensor, mask: Tensor | None, bits: Tensor | None, pruned: Tensor | None) -> None:
    """Writes the outputs that are not None for a contiguous ``x`` that ``fits``, ranked by magnitude."""
    config = halve_warps_on_amd(PAIRS.config(x, size_class(x)), x)
    units, block = x.numel() // 8, config["BLOCK"] // 8
    _nm24_pairs_kernel[(triton.cdiv(units, block),)](
        x, mask, bits, pruned, units, NAN=NANS[x.dtype], UNITS=block, num_warps=config["num_warps"]
    )


def scaled(x: Tensor, scale: Tensor, mask: Tensor, pruned: Tensor) -> None:
    """Writes both outputs for a contiguous ``x`` that ``fits``, ranked by magnitude times ``scale``."""
    config = halve_warps_on_amd(SCALED.config(x, size_class(x)), x)
    rows, units = x.numel() // x.shape[-1], x.shape[-1] // 8
    config["UNITS"] = min(triton.next_power_of_2(units), config["UNITS"])
    config["ROWS"] = config.pop("BLOCK") // 8 // config["UNITS"]
    grid = (triton.cdiv(rows, config["ROWS"]) * triton.cdiv(units, config["UNITS"]),)
    _nm24_scaled_kernel[grid](
        x, scale, mask, pruned, rows, units, BF16=x.dtype == torch.bfloat16, enable_fp_fusion=False, **config
    )
