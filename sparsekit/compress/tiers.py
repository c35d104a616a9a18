"""Layers in tiers: how small they can be packed, and random weights like theirs to measure with."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._layers import is_transposed
from ..masks import MaskInfo, Pattern, get_mask, tier_sizes
from ..ops import tier_prune
from ..ops.bits import nonzero
from ..ops.tiered import smallest_tiers
from ..ops.tiers import DENSE, SPARSE24, TOPK

STEP = 5  # percent; layers whose shares are equal when rounded to it are measured together


def kept_matrix(layer: nn.Linear | nn.Conv2d) -> Tensor:
    """Returns the entries that a layer keeps, bool ``[outputs, inputs]``: its stored mask, else its non-zeros.

    Of a convolution every tap is a row.
    """
    mask = get_mask(layer)
    kept = nonzero(layer.weight) if mask is None else mask
    if isinstance(layer, nn.Conv2d):
        return kept.permute(0, 2, 3, 1).flatten(0, 2)
    return kept.t() if is_transposed(layer) else kept


@dataclass(frozen=True)
class TierShares:
    """The shares of a layer's blocks that ``pack_tiered`` stores dense, as 2:4 and as top-k.

    Args:
        block: rows and columns of a block.
        k: entries that a top-k block holds.
        shares: those of the dense and of the 2:4 blocks; the others are top-k.
    """

    block: tuple[int, int]
    k: int
    shares: tuple[float, float]

    @staticmethod
    def of(layer: nn.Linear) -> "TierShares":
        """Returns the shares of a layer, with the block and the ``k`` of its mask's pattern."""
        block, k = tier_sizes(layer)
        tiers = smallest_tiers(kept_matrix(layer), block, k)
        dense, sparse24 = (int((tiers == tier).sum()) / max(tiers.numel(), 1) for tier in (DENSE, SPARSE24))
        return TierShares(block, k, (dense, sparse24))

    def bytes_of_dense(self, itemsize: int) -> float:
        """Returns the bytes of the packed blocks over those of the dense ones, for entries of ``itemsize`` bytes."""
        size = self.block[0] * self.block[1]
        dense, sparse24 = self.shares
        few = self.k * (itemsize + (1 if size <= 256 else 2)) / (size * itemsize)
        return dense + sparse24 * (1 / 2 + 1 / 8 / itemsize) + (1 - dense - sparse24) * few

    def rounded(self) -> "TierShares":
        """Returns the same with shares rounded to 5 %, by which measurements are remembered."""
        dense, sparse24 = (round(100 / STEP * share) * STEP / 100 for share in self.shares)
        return TierShares(self.block, self.k, (dense, sparse24))

    def info(self, axis: int) -> MaskInfo:
        """Returns the description of a mask with these blocks."""
        return MaskInfo(Pattern(n=self.k, unit=self.block, tiers=True), axis)

    def prune(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        """Returns a weight pruned to blocks in these shares, in places drawn at random."""
        grid = [-(-size // side) for size, side in zip(weight.shape, self.block, strict=True)]
        drawn = torch.rand(grid, generator=generator, dtype=torch.float32, device=weight.device)
        drawn = drawn.flatten().argsort().view(grid)
        dense, sparse24 = (round(share * drawn.numel()) for share in self.shares)
        tiers = torch.where(drawn < dense, DENSE, torch.where(drawn < dense + sparse24, SPARSE24, TOPK))
        return tier_prune(weight, tiers.to(torch.uint8), self.k, self.block)[0]
