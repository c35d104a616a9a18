"""Weights of the tiered format."""

import torch
from torch import Tensor

import sparsekit as sk

BLOCKS = [(16, 16), (32, 32), (64, 64), (128, 128), (16, 32), (9, 24)]


def tiered(
    rows: int, cols: int, block: tuple[int, int] = (16, 16), dtype: torch.dtype = torch.float32, k: int = 10
) -> tuple[Tensor, Tensor]:
    """A normal weight, its blocks pruned to tiers drawn at shares of .35, .45 and .20, and its mask."""
    share = torch.rand(-(-rows // block[0]), -(-cols // block[1]))
    tiers = (share > 0.35).to(torch.uint8) + (share > 0.8)
    return sk.tier_prune(torch.randn(rows, cols).to(dtype), tiers, k, block)[:2]
