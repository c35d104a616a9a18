"""``x @ W.T + bias`` that reads a packed 2:4 ``W`` directly: faster for few tokens, where the bytes of ``W`` count."""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._decode24 import decode, load_bits, load_words, operand, selectors, split_words
from ._launch import Config, Table, architecture, on, processors
from ._linear24_fp32 import linear24_fp32, tail_and_bias
from .sparse24 import unpack24

MOST_TOKENS = 64
_VENDORS = {"sm": "nvidia", "gf": "amd", "": ""}
# In a step a warp takes 8 * BLOCKS rows and 64 * LOADS of their columns. A program has ROW_WARPS warps for different
# rows; its other warps take other columns of the same rows, and their sums are added at the end. Where FILL is not 0,
# the grid splits the columns as well, until there are FILL programs per multiprocessor. A configuration is named by the
# rows and the warps of a program.
TABLE = Table(
    "linear24",
    {
        "16x4": {"BLOCKS": 2, "LOADS": 4, "ROW_WARPS": 1, "FILL": 0, "num_warps": 4},
        "16x8": {"BLOCKS": 2, "LOADS": 4, "ROW_WARPS": 1, "FILL": 0, "num_warps": 8},
        "32x8": {"BLOCKS": 4, "LOADS": 1, "ROW_WARPS": 1, "FILL": 0, "num_warps": 8},
        "32x16": {"BLOCKS": 4, "LOADS": 1, "ROW_WARPS": 1, "FILL": 0, "num_warps": 16},
        "64x8": {"BLOCKS": 4, "LOADS": 1, "ROW_WARPS": 2, "FILL": 0, "num_warps": 8},
        "64x8_split": {"BLOCKS": 4, "LOADS": 1, "ROW_WARPS": 2, "FILL": 2, "num_warps": 8},
        "128x8_split": {"BLOCKS": 4, "LOADS": 1, "ROW_WARPS": 4, "FILL": 1, "num_warps": 8},
    },
    {
        f"{tokens}_{size}": name
        for tokens, names in {
            1: ("16x4", "16x8", "16x8", "16x8"),
            8: ("16x4", "16x8", "32x8", "32x8"),
            16: ("16x4", "32x16", "64x8", "64x8_split"),
            32: ("32x8", "64x8_split", "64x8", "64x8_split"),
            64: ("32x8", "128x8_split", "128x8_split", "128x8_split"),
        }.items()
        for size, name in zip(("small", "medium", "wide", "deep"), names, strict=True)
    },
)


@triton.jit
def _load_step(rows, strides, chunk, x_chunk, cols, inside, x_inside, ALIGNED: tl.constexpr, LOADS: tl.constexpr):
    """Loads mask bits, values and inputs of ``LOADS`` times four chunks of 16 columns per warp, from ``chunk`` on."""
    values, bitmask, x = rows
    values_col, bitmask_col, x_col = strides
    groups = cols // 4
    each, word = tl.arange(0, 4)[None, :], tl.arange(0, 16)[None, :]
    bits, weights, x_front, x_back = (), (), (), ()
    for load in tl.static_range(LOADS):
        at = chunk + 4 * load + each
        bits += (load_bits(bitmask, at, bitmask_col, (cols + 7) // 8, inside & (4 * at < groups), ALIGNED),)
        at = 4 * (chunk + 4 * load) + word
        weights += (load_words(values, at, values_col, inside & (at < groups), ALIGNED, "evict_first"),)
        at = 8 * (x_chunk + 4 * load) + word // 4 * 8 + word % 4  # the first four of a chunk's eight words
        x_front += (load_words(x, at, x_col, x_inside & (at < 2 * groups), ALIGNED, ""),)
        x_back += (load_words(x, at + 4, x_col, x_inside & (at + 4 < 2 * groups), ALIGNED, ""),)
    return bits, weights, x_front, x_back


@triton.jit(do_not_specialize=["tokens", "steps"])
def _linear24_kernel(
    x,
    values,
    bitmask,
    bias,
    y,
    tokens,
    rows,
    cols,
    steps,
    x_row,
    x_col,
    values_row,
    values_col,
    bitmask_row,
    bitmask_col,
    TOKEN_BLOCKS: tl.constexpr,
    TAIL: tl.constexpr,
    ALIGNED: tl.constexpr,
    TARGET: tl.constexpr,
    WARPS: tl.constexpr,
    BLOCKS: tl.constexpr,
    LOADS: tl.constexpr,
    ROW_WARPS: tl.constexpr,
):
    COL_WARPS: tl.constexpr = WARPS // ROW_WARPS
    tiles = tl.cdiv(tokens, 8 * TOKEN_BLOCKS)
    row_tile, token_tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles  # neighboring programs share rows, in L2
    # Of every 8 * WARPS rows a warp holds eight, with four threads for each row and 16 bytes in a thread. An operand of
    # mma has the same layout, so that nothing moves between threads.
    index = tl.arange(0, BLOCKS * WARPS * 8)[:, None]
    warp = index // 8 % WARPS
    row = ((row_tile * ROW_WARPS + warp // COL_WARPS) * BLOCKS + index // (8 * WARPS)) * 8 + index % 8
    chunk = (tl.program_id(1) * steps * COL_WARPS + warp % COL_WARPS) * LOADS * 4
    index = tl.arange(0, TOKEN_BLOCKS * WARPS * 8)[:, None]
    token = (token_tile * TOKEN_BLOCKS + index // (8 * WARPS)) * 8 + index % 8
    x_chunk = (tl.program_id(1) * steps * COL_WARPS + index // 8 % WARPS % COL_WARPS) * LOADS * 4
    starts = (
        values + row.to(tl.int64) * values_row,
        bitmask + row.to(tl.int64) * bitmask_row,
        x + token.to(tl.int64) * x_row,
    )
    strides = (values_col, bitmask_col, x_col)
    current = _load_step(starts, strides, chunk, x_chunk, cols, row < rows, token < tokens, ALIGNED, LOADS)
    acc = tl.zeros((WARPS, 8 * BLOCKS, 8 * TOKEN_BLOCKS), tl.float32)
    for step in range(1, steps + 1):
        chunk += COL_WARPS * LOADS * 4
        x_chunk += COL_WARPS * LOADS * 4
        more = step < steps
        # The next step's loads are issued before this step's products, so that all are in flight at once.
        upcoming = _load_step(
            starts, strides, chunk, x_chunk, cols, (row < rows) & more, (token < tokens) & more, ALIGNED, LOADS
        )
        bits, weights, x_front, x_back = current
        for load in tl.static_range(LOADS):
            each = tl.reshape(bits[load], BLOCKS, WARPS, 8, 4)
            entry0, entry1, entry2, entry3 = selectors(each, TARGET)
            words = split_words(weights[load], WARPS)
            inputs = split_words(x_front[load], WARPS) + split_words(x_back[load], WARPS)
            for group in tl.static_range(4):
                front, back = decode(words[group], entry0, entry1, entry2, entry3, group, TARGET)
                left = operand(front, back, x.dtype.element_ty)
                right = operand(inputs[2 * group], inputs[2 * group + 1], x.dtype.element_ty)
                if TARGET == "":  # the interpreter of Triton 3.7 would multiply the bits of bfloat16
                    left, right = left.to(tl.float32), right.to(tl.float32)
                acc = tl.dot(left, tl.permute(right, (0, 2, 1)), acc, input_precision="ieee")
        current = upcoming

    sums = tl.sum(tl.reshape(acc, ROW_WARPS, COL_WARPS, 8 * BLOCKS, 8 * TOKEN_BLOCKS), 1)
    sums = tl.reshape(sums, ROW_WARPS * 8 * BLOCKS, 8 * TOKEN_BLOCKS)
    row = row_tile * (ROW_WARPS * 8 * BLOCKS) + tl.arange(0, ROW_WARPS * 8 * BLOCKS)[:, None]
    token = token_tile * (8 * TOKEN_BLOCKS) + tl.arange(0, 8 * TOKEN_BLOCKS)[None, :]
    if tl.program_id(1) == 0:
        sums += tail_and_bias(
            x, values, bias, token, tokens, row, rows, cols, x_row, x_col, values_row, values_col, TAIL
        )
    at = (tl.program_id(1).to(tl.int64) * tokens + token) * rows + row
    tl.store(y + at, sums.to(y.dtype.element_ty), (row < rows) & (token < tokens))


@triton.jit(do_not_specialize=["splits"])
def _add_splits_kernel(partial, y, size, splits, BLOCK: tl.constexpr):
    """Adds the sums of all splits of the columns."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(partial + split * size + index, index < size, 0)
    tl.store(y + index, total.to(y.dtype.element_ty), index < size)


def linear24(x: Tensor, values: Tensor, bitmask: Tensor, bias: Tensor | None) -> Tensor:
    rows, cols = values.shape[0], x.shape[-1]
    tokens = math.prod(x.shape[:-1])
    if tokens > MOST_TOKENS:
        return F.linear(x, unpack24(values, bitmask, cols), bias)
    y = x.new_empty((*x.shape[:-1], rows))
    if tokens and rows:
        flat = x if x.dim() == 2 else x.reshape(tokens, cols)
        if bias is not None and not bias.is_contiguous():
            bias = bias.contiguous()
        with on(x):
            (linear24_fp32 if x.dtype == torch.float32 else _linear_16)(flat, values, bitmask, bias, y)
    return y


def _linear_16(x: Tensor, values: Tensor, bitmask: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Writes ``x @ W.T + bias`` of 16-bit tensors into ``y``; ``x`` is a matrix."""
    tokens, cols = x.shape
    rows = values.shape[0]
    arch = architecture(x)
    name = TABLE.name(arch, _shape_class(tokens, rows, cols))
    grid, steps, constants = _plan(tokens, rows, cols, name, arch, processors(x))
    partial = y if grid[1] == 1 else x.new_empty((grid[1], tokens, rows), dtype=torch.float32)
    _linear24_kernel[grid](
        x,
        values,
        bitmask,
        bias,
        partial,
        tokens,
        rows,
        cols,
        steps,
        *x.stride(),
        *values.stride(),
        *bitmask.stride(),
        ALIGNED=_aligned(x, 4) and _aligned(values, 4) and _aligned(bitmask, 2),
        **constants,
    )
    if grid[1] > 1:
        _add_splits_kernel[(-(-y.numel() // 256),)](partial, y, y.numel(), grid[1], BLOCK=256, num_warps=2)


@lru_cache(maxsize=4096)
def _shape_class(tokens: int, rows: int, cols: int) -> str:
    """Returns the shape class: the bucket of the number of tokens, and the size or proportion of the weight."""
    bucket = 1 if tokens == 1 else 8 if tokens <= 8 else 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    if rows * cols < 1 << 22:
        return f"{bucket}_small"
    return f"{bucket}_medium" if rows * cols < 1 << 25 else f"{bucket}_deep" if cols > rows else f"{bucket}_wide"


@lru_cache(maxsize=4096)  # a model has few shapes, and planning takes longer than the kernel
def _plan(
    tokens: int, rows: int, cols: int, name: str, arch: str, processors: int
) -> tuple[tuple[int, int], int, Config]:
    """Returns the grid (programs, splits of the columns), the steps of a program, and the kernel's constants."""
    config = TABLE.configs[name]
    vendor = _VENDORS[arch[:2]]
    blocks = min(triton.next_power_of_2(triton.cdiv(tokens, 8)), 4)  # sums of more tokens would not fit the registers
    blocks = max(blocks, 2) if vendor == "amd" else blocks  # the narrowest mfma has 16 columns
    programs = triton.cdiv(rows, 8 * config["BLOCKS"] * config["ROW_WARPS"]) * triton.cdiv(tokens, 8 * blocks)
    steps = triton.cdiv(cols, 64 * config["LOADS"] * (config["num_warps"] // config["ROW_WARPS"]))
    splits = max(1, min(config["FILL"] * processors // programs, steps))
    steps = triton.cdiv(steps, splits)
    constants = {key: value for key, value in config.items() if key != "FILL"}
    constants |= {"TOKEN_BLOCKS": blocks, "TAIL": cols % 4, "TARGET": vendor, "WARPS": config["num_warps"]}
    return (programs, splits), steps, constants | {"num_stages": 1}


def _aligned(tensor: Tensor, size: int) -> bool:
    """Checks whether rows can be read ``size`` bytes at a time."""
    row, col = tensor.stride()
    return col == 1 and not (row * tensor.element_size() % size or tensor.data_ptr() % size)
