"""Layers in tiers: how small they can be packed, and weights like theirs to measure with."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._layers import is_transposed
from ..masks import MaskInfo, Pattern, get_mask, tier_sizes
from ..ops import tier_prune
from ..ops.bits import nonzero
from ..ops.tiered import smallest_tiers
from ..ops.tiers import DENSE, SPARSE24, TOPK

STEP = 5  # percent: layers whose shares agree to this are measured together


def kept_matrix(layer: nn.Linear) -> Tensor:
    """What a layer keeps, bool ``[outputs, inputs]``: its stored mask, else its non-zeros."""
    mask = get_mask(layer)
    kept = nonzero(layer.weight) if mask is None else mask
    return kept.t() if is_transposed(layer) else kept


@dataclass(frozen=True)
class Tiers:
    """The blocks of a layer in the forms that ``pack_tiered`` gives them.

    Args:
        block: rows and columns of a block.
        k: entries that a block of top-k holds.
        shares: of the blocks that are dense and 2:4; the others are top-k.
    """

    block: tuple[int, int]
    k: int
    shares: tuple[float, float]

    @staticmethod
    def of(layer: nn.Linear) -> "Tiers":
        """Those of a layer, of the sizes that its mask's pattern says."""
        block, k = tier_sizes(layer)
        tiers = smallest_tiers(kept_matrix(layer), block, k)
        dense, sparse24 = (int((tiers == tier).sum()) / max(tiers.numel(), 1) for tier in (DENSE, SPARSE24))
        return Tiers(block, k, (dense, sparse24))

    def bytes_of_dense(self, itemsize: int) -> float:
        """The packed blocks' bytes over those of the same blocks in full, by bytes of an entry."""
        size = self.block[0] * self.block[1]
        dense, sparse24 = self.shares
        few = self.k * (itemsize + (1 if size <= 256 else 2)) / (size * itemsize)
        return dense + sparse24 * (1 / 2 + 1 / 8 / itemsize) + (1 - dense - sparse24) * few

    def rounded(self) -> "Tiers":
        """The same with shares in steps of 5 %: what measurements are remembered by."""
        dense, sparse24 = (round(100 / STEP * share) * STEP / 100 for share in self.shares)
        return Tiers(self.block, self.k, (dense, sparse24))

    def info(self, axis: int) -> MaskInfo:
        """What a mask of these sizes says of itself."""
        return MaskInfo(Pattern(n=self.k, unit=self.block, tiers=True), axis)

    def prune(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        """A weight with as many blocks of each form, in places drawn at random."""
        grid = [-(-size // side) for size, side in zip(weight.shape, self.block, strict=True)]
        drawn = torch.rand(grid, generator=generator, dtype=torch.float32, device=weight.device)
        drawn = drawn.flatten().argsort().view(grid)
        dense, sparse24 = (round(share * drawn.numel()) for share in self.shares)
        tiers = torch.where(drawn < dense, DENSE, torch.where(drawn < dense + sparse24, SPARSE24, TOPK))
        return tier_prune(weight, tiers.to(torch.uint8), self.k, self.block)[0]
