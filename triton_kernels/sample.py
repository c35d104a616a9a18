"""Random N:M masks, drawn from logits, and the step of their logits, with one read and one write of the logits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._counter_random import entry_words, exact_exp, exact_gumbel
from ._launch import on
from ._select import widen

OTHER_STREAM = 1 << 31  # of the upper half of an offset


@triton.jit
def _entry(x, index, i):
    """Returns entry ``i`` of every group, as a column."""
    return tl.sum(tl.where(index == i, x, 0), 1, keep_dims=True)


@triton.jit
def _noisy(logits, words):
    keys = logits + exact_gumbel(words)
    return tl.where(keys == keys, keys, float("-inf"))


@triton.jit
def _ranks(keys, counted, index, M: tl.constexpr):
    """Returns how many of the entries that ``counted`` marks rank before each entry."""
    before = tl.zeros_like(index + counted)
    for i in tl.static_range(M):
        key = tl.max(tl.where(index == i, keys, float("-inf")), 1, keep_dims=True)
        ahead = (key > keys) | ((key == keys) & (index > i))
        before += ahead.to(tl.int32) * _entry(counted, index, i)
    return before


@triton.jit
def _total(x, index, M: tl.constexpr):
    """Sums every group from its first entry to its last."""
    total = _entry(x, index, 0)
    for i in tl.static_range(1, M):
        total += _entry(x, index, i)
    return total


@triton.jit
def _total_of_others(x, index, M: tl.constexpr):
    """Sums every group without the entry itself, in that order."""
    total = tl.zeros_like(x)
    for i in tl.static_range(M):
        total += tl.where(index == i, 0.0, _entry(x, index, i))
    return total


@triton.jit
def _shares_of_two(weights, kept, index, M: tl.constexpr):
    rest = _total_of_others(weights, index, M)
    of_kept = tl.where(kept != 0, rest, 0.0)
    both = _total(of_kept, index, M)
    after = tl.where(kept != 0, tl.div_rn(_total_of_others(of_kept, index, M), both * rest), 0.0)
    total = _total(weights, index, M)
    shares = tl.zeros_like(weights) + tl.div_rn(tl.zeros_like(total) + 1.0, total)
    for i in tl.static_range(M):
        shares += tl.where(index == i, 0.0, _entry(after, index, i))
    return shares


@triton.jit
def _shares_in_order(weights, kept, keys, index, N: tl.constexpr, M: tl.constexpr):
    before = _ranks(keys, kept, index, M)
    shares = tl.zeros_like(weights)
    for turn in tl.static_range(N):
        there = (kept == 0) | (before >= turn)
        total = _total(tl.where(there, weights, 0.0), index, M)
        shares += tl.where(there, tl.div_rn(tl.zeros_like(total) + 1.0, total), 0.0)
    return shares


@triton.jit(do_not_specialize=["seed", "low", "high", "next_low", "next_high", "other_high"])
def _sample_kernel(
    logits_ptr,
    drawn_ptr,
    advantage_ptr,
    lr,
    mask_ptr,
    bits_ptr,
    groups,
    row_groups,
    cols,
    seed,
    low,
    high,
    next_low,
    next_high,
    other_high,
    N: tl.constexpr,
    M: tl.constexpr,
    COUNTERS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Updates the logits of GROUPS groups, where a mask was drawn, and draws the next mask.

    The step's mask has the offset ``low, high``, the next one ``next_low, next_high``; the numbers by which bfloat16 is
    rounded have ``next_low, other_high``.
    """
    first = tl.program_id(0).to(tl.int64) * GROUPS
    group = first + tl.arange(0, GROUPS)[:, None]
    index = tl.arange(0, WIDTH)[None, :]
    inside = (group < groups) & (index < M)
    row, col = group // row_groups, group % row_groups * M + index
    at = logits_ptr + row * cols + col
    logits = widen(tl.load(at, mask=inside, other=0.0))
    index = tl.broadcast_to(index, [GROUPS, WIDTH])

    if drawn_ptr is not None:
        byte = tl.load(drawn_ptr + row * tl.cdiv(cols, 8) + col // 8, mask=inside, other=0).to(tl.int32)
        kept = tl.where(index < M, byte >> (col % 8).to(tl.int32) & 1, 0)
        largest = tl.full([GROUPS, 1], -3.4028234663852886e38, tl.float32)
        for i in tl.static_range(M):
            entry = _entry(logits, index, i)
            largest = tl.where((largest >= entry) | (largest != largest), largest, entry)
        below = logits - largest
        weights = exact_exp(tl.where(below >= -28.0, below, -28.0))
        if N == 2:
            shares = _shares_of_two(weights, kept, index, M)
        else:
            words = entry_words(first, COUNTERS, seed, low, high, GROUPS, WIDTH)
            shares = _shares_in_order(weights, kept, _noisy(logits, words), index, N, M)
        step = tl.load(advantage_ptr) * lr
        logits = logits - step * (kept.to(tl.float32) - weights * shares)
        if at.dtype.element_ty == tl.bfloat16:  # rounds at random
            words = entry_words(first, COUNTERS, seed, next_low, other_high, GROUPS, WIDTH)
            bits = logits.to(tl.uint32, bitcast=True)
            cut = tl.where((bits & 0x7F800000) == 0x7F800000, 0, words & 0xFFFF)
            logits = ((bits + cut.to(tl.uint32)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        tl.store(at, logits.to(at.dtype.element_ty), mask=inside)

    words = entry_words(first, COUNTERS, seed, next_low, next_high, GROUPS, WIDTH)
    keys = _noisy(logits, words)
    keep = (_ranks(keys, tl.full([GROUPS, WIDTH], 1, tl.int32), index, M) < N) & inside
    if mask_ptr is not None:
        tl.store(mask_ptr + row * cols + col, keep, mask=inside)
    if bits_ptr is not None:  # the tensor is whole bytes, and a group a power of two
        bits = tl.reshape(keep.to(tl.int32), [GROUPS * WIDTH // 8, 8]) << tl.arange(0, 8)[None, :]
        byte = first * WIDTH // 8 + tl.arange(0, GROUPS * WIDTH // 8)
        tl.store(bits_ptr + byte, tl.sum(bits, 1).to(tl.uint8), mask=byte < groups * WIDTH // 8)


@triton.jit
def _pack_kernel(mask_ptr, bits_ptr, bytes_, row_bytes, cols, BLOCK: tl.constexpr):
    """Packs the rows of a mask to bits."""
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    col = byte % row_bytes * 8 + tl.arange(0, 8)[None, :]
    inside = (byte < bytes_) & (col < cols)
    keep = tl.load(mask_ptr + byte // row_bytes * cols + col, mask=inside, other=0).to(tl.int32)
    bits = tl.sum(keep << tl.arange(0, 8)[None, :], 1, keep_dims=True)
    tl.store(bits_ptr + byte, bits.to(tl.uint8), mask=byte < bytes_)


def _launch(
    logits: Tensor, drawn: Tensor | None, advantage: Tensor | None, lr: float, n: int, m: int, seed: int, offset: int
) -> Tensor:
    """Returns the mask of ``offset`` for contiguous logits, which are stepped first if there is a mask before it."""
    cols = logits.shape[-1]
    bits = torch.empty((*logits.shape[:-1], triton.cdiv(cols, 8)), dtype=torch.uint8, device=logits.device)
    if logits.numel() == 0:
        return bits
    width = max(4, triton.next_power_of_2(m))
    direct = width == m and cols % max(8, m) == 0
    mask = None if direct else torch.ones(logits.shape, dtype=torch.uint8, device=logits.device)  # a tail is kept
    groups, tile = logits.numel() // cols * (cols // m), 1024 // width
    low, high, next_low, next_high = (each >> shift & 0xFFFFFFFF for each in (offset - 1, offset) for shift in (0, 32))
    with on(logits):
        if groups:
            _sample_kernel[(triton.cdiv(groups, tile),)](
                logits,
                drawn,
                advantage,
                lr,
                mask,
                bits if direct else None,
                groups,
                cols // m,
                cols,
                seed,
                low,
                high,
                next_low,
                next_high,
                next_high ^ OTHER_STREAM,
                N=n,
                M=m,
                COUNTERS=triton.cdiv(m, 4),
                GROUPS=tile,
                WIDTH=width,
                enable_fp_fusion=False,
            )
        if mask is not None:
            _pack_kernel[(triton.cdiv(bits.numel(), 512),)](mask, bits, bits.numel(), bits.shape[-1], cols, BLOCK=512)
    return bits


def nm_sample(logits: Tensor, n: int, m: int, seed: int, offset: int) -> Tensor:
    return _launch(logits.contiguous(), None, None, 0.0, n, m, seed, offset)


def nm_policy_step_(
    logits: Tensor, bits: Tensor, advantage: Tensor, lr: float, n: int, m: int, seed: int, offset: int
) -> Tensor:
    written = logits.contiguous()
    next_bits = _launch(written, bits.contiguous(), advantage, lr, n, m, seed, offset + 1)
    if written is not logits:
        logits.copy_(written)
    return next_bits
