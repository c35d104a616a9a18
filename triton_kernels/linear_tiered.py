"""``x @ W.T + bias`` that reads a tiered ``W`` directly: faster for few tokens, where the bytes of ``W`` count."""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._decode24 import decode, operand, selectors, split_words
from ._launch import Config, Table, architecture, on, processors
from ._tiered_columns import Packed, counts, list_columns, load_tiers, scan_size
from ._tiered_fp32 import linear_tiered_fp32
from ._tiered_loads import load24, load_dense, load_entries, load_x, multiply, multiply_entries
from ._tiered_unpack import unpack_tiered
from .linear24 import _add_splits_kernel

_VENDORS = {"sm": "nvidia", "gf": "amd", "": ""}
# A program takes 16 or 32 rows of a row of blocks. Its warps divide the units (see _tiered_loads) of the blocks of each
# form among them: in a step a warp takes four units of dense blocks DENSE times, or of 2:4 blocks SPARSE24 times. Where
# FILL is not 0, the grid splits the units as well, until there are FILL programs per multiprocessor. A configuration is
# named by the warps of a program.
TABLE = Table(
    "linear_tiered",
    {
        "4": {"DENSE": 4, "SPARSE24": 4, "FILL": 0, "num_warps": 4},
        "8": {"DENSE": 2, "SPARSE24": 2, "FILL": 0, "num_warps": 8},
        "8_split": {"DENSE": 1, "SPARSE24": 1, "FILL": 2, "num_warps": 8},
        "16": {"DENSE": 1, "SPARSE24": 1, "FILL": 0, "num_warps": 16},
    },
    {f"{tokens}_{size}": name for tokens in (1, 8, 16, 64) for size, name in (("few", "8_split"), ("many", "8"))},
)


@triton.jit(do_not_specialize=["tokens"])
def _linear_tiered_kernel(
    x,
    packed,
    columns,
    bias,
    y,
    tokens,
    rows,
    cols,
    row_words,
    across,
    x_row,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    K: tl.constexpr,
    SCAN: tl.constexpr,
    WHOLE: tl.constexpr,
    GROUPS: tl.constexpr,
    TOKEN_OCTETS: tl.constexpr,
    OCTETS: tl.constexpr,
    DENSE: tl.constexpr,
    SPARSE24: tl.constexpr,
    TARGET: tl.constexpr,
    WARPS: tl.constexpr,
):
    strips: tl.constexpr = (BLOCK_ROWS + 8 * OCTETS - 1) // (8 * OCTETS)
    units: tl.constexpr = BLOCK_COLS // 8
    units24: tl.constexpr = BLOCK_COLS // (4 * GROUPS)
    tiles = tl.cdiv(tokens, 8 * TOKEN_OCTETS)
    strip, token_tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles  # neighboring programs share rows, in L2
    block_row, first_row = strip // strips, strip % strips * (8 * OCTETS)
    split, splits = tl.program_id(1), tl.num_programs(1)
    tiers, dense, values, bitmask, topk, positions, starts = packed
    tiers += block_row.to(tl.int64) * across
    tier = load_tiers(tiers, 0, across, SCAN)
    dense_from, from24, topk_from, dense_count, count24, topk_count = counts(starts, block_row)
    dense += dense_from * (BLOCK_ROWS * BLOCK_COLS)
    values += from24 * (BLOCK_ROWS * BLOCK_COLS // 2)
    bitmask += from24 * (BLOCK_ROWS * units)
    topk += topk_from * K
    positions += topk_from * K
    columns += block_row.to(tl.int64) * across
    columns24 = columns + dense_count
    dense_words = dense.to(tl.pointer_type(tl.int32))
    words24 = values.to(tl.pointer_type(tl.int32))

    # A warp holds eight rows by four threads. An operand of mma has the same layout, so that nothing moves between
    # threads (see linear24).
    index = tl.arange(0, 8 * OCTETS * WARPS)[:, None]
    # Not `index % 8`: the compiler would see that rows are neighbors, and load their bits in another layout.
    row = first_row + index // (8 * WARPS) * 8 + (index & 7)
    lane = index // 8 % WARPS * 4 + tl.arange(0, 4)[None, :]
    index = tl.arange(0, 8 * TOKEN_OCTETS * WARPS)[:, None]
    x_lane = index // 8 % WARPS * 4 + tl.arange(0, 4)[None, :]
    token = (token_tile * TOKEN_OCTETS + index // (8 * WARPS)) * 8 + index % 8
    live = token < tokens
    x_words = x.to(tl.pointer_type(tl.int32)) + token.to(tl.int64) * (x_row // 2) + tl.zeros((1, 4), tl.int32)

    # The first dense weights are loaded while the columns are listed, and the first 2:4 weights during top-k.
    weights, kept, bits = (), (), ()
    for load in tl.static_range(DENSE):
        weights += (load_dense(dense_words, split, lane, row, dense_count, load, DENSE, BLOCK_ROWS, BLOCK_COLS, WARPS),)
    list_columns(tiers, tier, columns, across, dense_count, count24, SCAN)

    # Zero, but not to the compiler: without it the words would be moved to mma's registers, and waited for, right away.
    zero = dense_count >> 31
    acc = tl.zeros((WARPS, 8 * OCTETS, 8 * TOKEN_OCTETS), tl.float32)
    for step in range(split, tl.cdiv(dense_count * units, 4 * WARPS * DENSE), splits):
        inputs = load_x(
            x_words, columns, step, x_lane, live, dense_count, row_words, DENSE, WHOLE, 4, BLOCK_COLS, WARPS
        )
        upcoming = ()
        for load in tl.static_range(DENSE):
            word = split_words(weights[load] ^ zero, WARPS)
            for half in tl.static_range(2):
                left = operand(word[2 * half], word[2 * half + 1], x.dtype.element_ty)
                input = inputs[4 * load + 2 * half], inputs[4 * load + 2 * half + 1]
                right = operand(input[0], input[1], x.dtype.element_ty)
                acc = multiply(left, right, acc, TARGET)
            upcoming += (
                load_dense(
                    dense_words, step + splits, lane, row, dense_count,
                    load, DENSE, BLOCK_ROWS, BLOCK_COLS, WARPS,
                ),
            )  # fmt: skip
        weights = upcoming

    columns_topk, first_token = columns24 + count24, token_tile * TOKEN_OCTETS * 8
    if K > 0:
        entries, places, column = load_entries(topk, positions, columns_topk, split, topk_count, WARPS, K)
    for load in tl.static_range(SPARSE24):
        loaded = load24(
            words24, bitmask, split, lane, row, count24, load, SPARSE24, BLOCK_ROWS, BLOCK_COLS, GROUPS, WARPS
        )
        kept += (loaded[0],)
        bits += (loaded[1],)
    if K > 0:
        for step in range(split, tl.cdiv(topk_count * ((K + 3) // 4), 4 * WARPS), splits):
            following = load_entries(topk, positions, columns_topk, step + splits, topk_count, WARPS, K)
            acc = multiply_entries(
                entries, places, column, acc, x, x_row, first_token, tokens, first_row, cols,
                WHOLE, BLOCK_COLS, OCTETS, TOKEN_OCTETS, WARPS, TARGET,
            )  # fmt: skip
            entries, places, column = following

    words: tl.constexpr = 2 * GROUPS  # of x in a unit
    for step in range(split, tl.cdiv(count24 * units24, 4 * WARPS * SPARSE24), splits):
        inputs = load_x(
            x_words, columns24, step, x_lane, live, count24, row_words, SPARSE24, WHOLE, words, BLOCK_COLS, WARPS
        )
        upcoming, upcoming_bits = (), ()
        for load in tl.static_range(SPARSE24):
            if GROUPS == 4:
                word = split_words(kept[load], WARPS)
            else:
                word = tl.split(tl.reshape(kept[load], OCTETS, WARPS, 8, 4, 2))
            entry0, entry1, entry2, entry3 = selectors(tl.reshape(bits[load], OCTETS, WARPS, 8, 4), TARGET)
            for group in tl.static_range(GROUPS):
                front, back = decode(word[group], entry0, entry1, entry2, entry3, group, TARGET)
                left = operand(front, back, x.dtype.element_ty)
                input = inputs[words * load + 2 * group], inputs[words * load + 2 * group + 1]
                right = operand(input[0], input[1], x.dtype.element_ty)
                acc = multiply(left, right, acc, TARGET)
            loaded = load24(
                words24, bitmask, step + splits, lane, row, count24,
                load, SPARSE24, BLOCK_ROWS, BLOCK_COLS, GROUPS, WARPS,
            )  # fmt: skip
            upcoming += (loaded[0],)
            upcoming_bits += (loaded[1],)
        kept, bits = upcoming, upcoming_bits

    sums = tl.sum(acc, 0)
    inside = first_row + tl.arange(0, 8 * OCTETS)[:, None]
    row = block_row * BLOCK_ROWS + inside
    inside = (inside < BLOCK_ROWS) & (row < rows)
    token = token_tile * (8 * TOKEN_OCTETS) + tl.arange(0, 8 * TOKEN_OCTETS)[None, :]
    if bias is not None:
        sums += tl.where(split == 0, tl.load(bias + row, inside, 0).to(tl.float32), 0.0)
    at = (split.to(tl.int64) * tokens + token) * rows + row
    tl.store(y + at, sums.to(y.dtype.element_ty), inside & (token < tokens))


def linear_tiered(
    x: Tensor,
    tiers: Tensor,
    dense: Tensor,
    values: Tensor,
    bitmask: Tensor,
    topk: Tensor,
    positions: Tensor,
    starts: Tensor,
    bias: Tensor | None,
    out_features: int,
) -> Tensor:
    tokens, cols = math.prod(x.shape[:-1]), x.shape[-1]
    packed = Packed(*map(_to_aligned, (tiers, dense, values, bitmask, topk, positions, starts)))
    if tokens > most_tokens(packed.block[0]):
        return F.linear(x, unpack_tiered(packed, out_features, cols), bias)
    y = x.new_empty((*x.shape[:-1], out_features))
    if tokens and out_features:
        bias = bias if bias is None else bias.contiguous()
        with on(x):
            (linear_tiered_fp32 if x.dtype == torch.float32 else _linear_16)(x.reshape(tokens, cols), packed, bias, y)
    return y


def _to_aligned(part: Tensor) -> Tensor:
    """Returns the tensor contiguous and aligned to 16 bytes; only views into other tensors are copied."""
    part = part.contiguous()
    return part if part.data_ptr() % 16 == 0 else part.clone()


def most_tokens(block_rows: int) -> int:
    """Returns the number of tokens above which the weight is unpacked for cuBLAS.

    Every program reads all of ``x``, mostly from L2. At 4096 x 4096 in 16 bits that is 2.1 MB a token, or half of it
    where programs take 32 rows. Unpacking moves 54 MB once, of which cuBLAS reads 34 MB again.
    """
    return 64 if block_rows % 32 == 0 else 32


def _octets(tokens: int, block_rows: int) -> int:
    """Returns how many times eight rows a program takes."""
    return 4 if tokens > 16 and block_rows % 32 == 0 else 2


def _linear_16(x: Tensor, packed: Packed, bias: Tensor | None, y: Tensor) -> None:
    """Writes ``x @ W.T + bias`` of 16-bit tensors into ``y``; ``x`` is a matrix."""
    blocks, block = packed.blocks, packed.block
    (tokens, cols), rows = x.shape, y.shape[-1]
    if cols % 2 or x.stride(1) != 1 or x.stride(0) % 2 or x.data_ptr() % 4:  # cannot be read in words
        x = F.pad(x, (0, cols % 2)).contiguous()
    arch = architecture(x)
    name = TABLE.name(arch, _shape_class(tokens, blocks[0], block[0], processors(x)))
    grid, constants = _plan(tokens, blocks, block, name, arch, processors(x))
    partial = y if grid[1] == 1 else x.new_empty((grid[1], tokens, rows), dtype=torch.float32)
    _linear_tiered_kernel[grid](
        x,
        packed,
        torch.empty(blocks, dtype=torch.int32, device=x.device),
        bias,
        partial,
        tokens,
        rows,
        cols,
        triton.cdiv(cols, 2),
        blocks[1],
        x.stride(0),
        K=packed.k,
        WHOLE=cols % block[1] == 0,
        **constants,
    )
    if grid[1] > 1:
        _add_splits_kernel[(-(-y.numel() // 256),)](partial, y, y.numel(), grid[1], BLOCK=256, num_warps=2)


def _shape_class(tokens: int, down: int, block_rows: int, processors: int) -> str:
    """Returns the shape class: the bucket of the number of tokens, and whether programs are few for the GPU."""
    bucket = 1 if tokens == 1 else 8 if tokens <= 8 else 16 if tokens <= 16 else 64
    programs = down * triton.cdiv(block_rows, 8 * _octets(tokens, block_rows))
    return f"{bucket}_{'few' if programs < processors else 'many'}"


@lru_cache(maxsize=4096)  # a model has few shapes, and planning takes longer than the kernel
def _plan(
    tokens: int, blocks: tuple[int, int], block: tuple[int, int], name: str, arch: str, processors: int
) -> tuple[tuple[int, int], Config]:
    """Returns the grid (programs, splits of the units) and the kernel's constants."""
    config = TABLE.configs[name]
    vendor, octets = _VENDORS[arch[:2]], _octets(tokens, block[0])
    token_octets = min(triton.next_power_of_2(triton.cdiv(tokens, 8)), 4)  # sums of more would not fit the registers
    token_octets = max(token_octets, 2) if vendor == "amd" else token_octets  # the narrowest mfma has 16 columns
    programs = blocks[0] * triton.cdiv(block[0], 8 * octets) * triton.cdiv(tokens, 8 * token_octets)
    most = triton.cdiv(blocks[1] * block[1] // 8, 8 * config["num_warps"])
    splits = max(1, min(config["FILL"] * processors // programs, most))
    taller = octets // 2 * max(1, token_octets // 2)  # by this factor a load takes more registers
    return (programs, splits), {
        "BLOCK_ROWS": block[0],
        "BLOCK_COLS": block[1],
        "SCAN": scan_size(blocks[1]),
        "TOKEN_OCTETS": token_octets,
        "OCTETS": octets,
        "GROUPS": 2 if block[1] % 16 else 4,
        "DENSE": max(1, config["DENSE"] // taller),
        "SPARSE24": max(1, config["SPARSE24"] // taller),
        "TARGET": vendor,
        "WARPS": config["num_warps"],
        "num_warps": config["num_warps"],
        "num_stages": 1,
    }
