"""Tier maps: the tier of every block of a weight, which is dense, 2:4 or top-k."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..masks import get_mask, get_mask_info, tier_sizes
from ..ops.tiered import smallest_tiers
from ..ops.tiers import SPARSE24, TOPK

COLORS = ((24, 45, 92), (70, 150, 190), (252, 214, 112))  # dense, 2:4, top-k; they also differ when printed in gray


class Ratios(NamedTuple):
    """The shares of the blocks that are dense, 2:4 and top-k."""

    dense: float
    mid_2_4: float
    topk: float


@dataclass(frozen=True)
class TierMap:
    """The tier of every block of one weight.

    Args:
        tiers: uint8 ``[ceil(rows / block[0]), ceil(cols / block[1])]``: 0 dense, 1 2:4, 2 top-k.
        shape: rows and columns of the weight.
        block: rows and columns of a block.
        k: the number of weights that a top-k block keeps.

    Raises:
        TypeError, ValueError: ``tiers`` is not such a tensor, ``shape`` or ``block`` is not two integers, ``k`` is not
            an integer, the block's columns are not a multiple of 4, or ``k`` is not between 0 and the block's size.
    """

    tiers: Tensor
    shape: tuple[int, int]
    block: tuple[int, int] = (16, 16)
    k: int = 10

    def __post_init__(self) -> None:
        for name, sides in (("shape", self.shape), ("block", self.block)):
            if not isinstance(sides, tuple) or len(sides) != 2 or any(type(side) is not int for side in sides):
                raise TypeError(f"{name} must be a tuple of two integers, rows and columns, got {sides!r}")
        if type(self.k) is not int:
            raise TypeError(f"k must be an integer, got {self.k!r}")
        (rows, cols), (block_rows, block_cols) = self.shape, self.block
        if rows < 0 or cols < 0:
            raise ValueError(f"shape must not be negative, got {self.shape}")
        if block_rows < 1 or block_cols < 4 or block_cols % 4:
            raise ValueError(f"block must have rows, and columns in a multiple of 4, got {self.block}")
        if not 0 <= self.k <= block_rows * block_cols:
            raise ValueError(f"k must be from 0 to {block_rows * block_cols}, the size of a block, got {self.k}")
        if not isinstance(self.tiers, Tensor) or self.tiers.dtype != torch.uint8:
            found = self.tiers.dtype if isinstance(self.tiers, Tensor) else type(self.tiers).__name__
            raise TypeError(f"tiers must be uint8, got {found}")
        grid = (-(-rows // block_rows), -(-cols // block_cols))
        if self.tiers.shape != grid:
            raise ValueError(
                f"tiers must have shape {grid} for a weight of {self.shape}, got {tuple(self.tiers.shape)}"
            )
        if self.tiers.numel() and int(self.tiers.max()) > TOPK:
            raise ValueError(f"a tier is 0 (dense), 1 (2:4) or 2 (top-k), got {int(self.tiers.max())}")

    @staticmethod
    def dense(weight: Tensor, block: tuple[int, int] = (16, 16), k: int = 10) -> "TierMap":
        """Returns the map with which every schedule starts, in which all blocks of ``weight`` are dense."""
        rows, cols = weight.shape
        grid = (-(-rows // block[0]), -(-cols // block[1]))
        return TierMap(torch.zeros(grid, dtype=torch.uint8, device=weight.device), (rows, cols), block, k)

    @staticmethod
    def of(layer: nn.Module) -> "TierMap":
        """Reads the map of a layer from the mask that ``progressive_tiers`` or ``tier_iteration`` stored.

        A block is top-k if it keeps at most ``k`` entries, else 2:4 if every four columns keep at most two, else dense,
        which is also how ``pack_tiered`` packs it. This is the tier to which the block was demoted, with three
        exceptions. A block at the edge may have so few entries that a smaller tier holds them. If the number of columns
        is 3 more than a multiple of 4, a 2:4 block at the right edge keeps all three and is read as dense. If ``k`` is
        half a block or more, a 2:4 block is read as top-k.

        Raises:
            ValueError: the layer has no stored mask whose pattern is tiers.
        """
        mask, info = get_mask(layer), get_mask_info(layer)
        if mask is None or info is None or not info.pattern.tiers:
            found = "no mask" if info is None else f"one of {str(info.pattern)!r}"
            raise ValueError(f"layer must have a stored mask of tiers, as progressive_tiers leaves it, got {found}")
        block, k = tier_sizes(layer)
        kept = mask.t() if info.axis == 0 else mask
        return TierMap(smallest_tiers(kept, block, k), (kept.shape[0], kept.shape[1]), block, k)

    @property
    def counts(self) -> tuple[int, int, int]:
        """Numbers of dense, 2:4 and top-k blocks."""
        dense, mid, topk = torch.bincount(self.tiers.flatten().long(), minlength=3).tolist()
        return dense, mid, topk

    @property
    def ratios(self) -> Ratios:
        """Shares of dense, 2:4 and top-k blocks."""
        return Ratios(*(count / max(self.tiers.numel(), 1) for count in self.counts))

    @property
    def sparsity(self) -> float:
        """The expected share of zeros: half of the 2:4 blocks, and all but ``k`` of each top-k block."""
        (rows, cols), (block_rows, block_cols) = self.shape, self.block
        if rows * cols == 0:
            return 0.0
        tiers = self.tiers.cpu()
        heights = (rows - block_rows * torch.arange(tiers.shape[0], device="cpu")).clamp(max=block_rows)
        widths = (cols - block_cols * torch.arange(tiers.shape[1], device="cpu")).clamp(max=block_cols)
        area = (heights[:, None] * widths).double()
        zeros = torch.where(tiers == SPARSE24, area / 2, torch.where(tiers == TOPK, (area - self.k).clamp(min=0), 0))
        return float(zeros.sum() / area.sum())

    def picture(self) -> Tensor:
        """Draws the map, uint8 ``[R, C, 3]``, with one RGB pixel per block: dense is dark, 2:4 blue, top-k light."""
        return torch.tensor(COLORS, dtype=torch.uint8, device="cpu")[self.tiers.cpu().long()]

    def __str__(self) -> str:
        dense, mid, topk = self.ratios
        blocks = f"{self.tiers.numel()} blocks of {self.block[0]}x{self.block[1]}"
        return f"{blocks}: {dense:.1%} dense, {mid:.1%} 2:4, {topk:.1%} top-{self.k}; {self.sparsity:.2%} sparse"
