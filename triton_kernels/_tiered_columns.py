"""A tiered weight as kernels take it, and the columns of its dense, 2:4 and top-k blocks in each row of blocks."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Packed(NamedTuple):
    """The tensors of a packed tiered weight, which kernels take as one argument."""

    tiers: Tensor
    dense: Tensor
    values: Tensor
    bitmask: Tensor
    topk: Tensor
    positions: Tensor
    starts: Tensor

    @property
    def blocks(self) -> tuple[int, int]:
        """Rows and columns of blocks."""
        return self.tiers.shape[0], self.tiers.shape[1]

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of a block."""
        return self.dense.shape[1], self.dense.shape[2]

    @property
    def k(self) -> int:
        """Entries that a top-k block keeps."""
        return self.topk.shape[1]


@triton.jit
def counts(starts, block_row):
    """Loads how many blocks of each form come before a row of blocks, int64, and how many it has, int32."""
    at = starts + 3 * block_row.to(tl.int64)
    dense, sparse24, topk = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    dense_count, count24, topk_count = tl.load(at + 3) - dense, tl.load(at + 4) - sparse24, tl.load(at + 5) - topk
    return dense.to(tl.int64), sparse24.to(tl.int64), topk.to(tl.int64), dense_count, count24, topk_count


@triton.jit
def load_tiers(tiers, start, across, SCAN: tl.constexpr):
    """Loads the tiers of ``SCAN`` blocks from column ``start`` of a row of blocks."""
    column = start + tl.arange(0, SCAN)
    return tl.load(tiers + column, column < across, 0)


@triton.jit
def list_columns(tiers, tier, columns, across, dense_count, count24, SCAN: tl.constexpr):
    """Writes the columns of the dense blocks of a row of blocks, then of its 2:4 blocks, then of its top-k blocks.

    ``tier`` has the tiers of the first ``SCAN`` blocks. Every program of a row of blocks writes the same list, so that
    each can read it without waiting for another.
    """
    seen24, seen_topk = 0, 0
    for start in range(0, across, SCAN):
        column = start + tl.arange(0, SCAN)
        both = (tier == 1).to(tl.int32) + ((tier == 2).to(tl.int32) << 16)  # two counts of at most SCAN, in one sum
        upto = tl.cumsum(both, 0)
        rank24, rank_topk = seen24 + (upto & 0xFFFF), seen_topk + (upto >> 16)  # its own block included
        at = tl.where(tier == 1, dense_count + rank24 - 1, dense_count + count24 + rank_topk - 1)
        at = tl.where(tier == 0, column - rank24 - rank_topk, at)
        tl.store(columns + at, column, column < across)
        total = tl.sum(both)
        seen24, seen_topk = seen24 + (total & 0xFFFF), seen_topk + (total >> 16)
        tier = load_tiers(tiers, start + SCAN, across, SCAN)
    tl.debug_barrier()


def scan_size(across: int) -> int:
    """Returns how many blocks of a row are scanned at once: few enough for their counts to fit 16 bits."""
    return min(max(triton.next_power_of_2(across), 16), 2048)
