"""Weights and layers in tiers."""

import torch
from torch import nn

import sparsekit as sk
from sparsekit.masks import MaskInfo, Pattern, set_mask

BLOCKS = [(16, 16), (32, 32), (64, 64), (128, 128), (16, 32), (9, 24)]
SHARES = (0.35, 0.45)  # of dense and 2:4 blocks, as the three-tier pruner ends


def tiered(rows, cols, block=(16, 16), dtype=torch.float32, k=10):
    """A normal weight, every block of which was pruned to a tier drawn at these shares, and its mask."""
    share = torch.rand(-(-rows // block[0]), -(-cols // block[1]))
    tiers = (share > SHARES[0]).to(torch.uint8) + (share > sum(SHARES))
    return sk.tier_prune(torch.randn(rows, cols).to(dtype), tiers, k, block)[:2]


def random_tiers(shape, block, count=4):
    """A tier map of a weight of this shape, of tiers below ``count``."""
    return torch.randint(0, count, (-(-shape[0] // block[0]), -(-shape[1] // block[1])), dtype=torch.uint8)


def tiers_of(rows, cols, block=(16, 16), shares=SHARES):
    """A tier map with these shares of dense and 2:4 blocks, to the nearest block, in places drawn at random."""
    grid = -(-rows // block[0]), -(-cols // block[1])
    count = grid[0] * grid[1]
    dense, middle = (round(share * count) for share in shares)
    tiers = torch.tensor([0] * dense + [1] * middle + [2] * (count - dense - middle), dtype=torch.uint8)
    return tiers[torch.randperm(count)].view(grid)


@torch.no_grad()
def prune_tiers(linear, block=(16, 16), k=10, shares=SHARES, axis=1):
    """Prunes a layer as ``tier_iteration`` does, and stores the mask; returns the layer."""
    weight = linear.weight.t() if axis == 0 else linear.weight
    pruned, mask, _ = sk.tier_prune(weight, tiers_of(*weight.shape, block, shares), k, block)
    linear.weight.copy_(pruned.t() if axis == 0 else pruned)
    info = MaskInfo(Pattern.parse(f"tiers {block[0]}x{block[1]} k={k}"), axis)
    set_mask(linear, mask.t().contiguous() if axis == 0 else mask, info)
    return linear


def tiered_linear(cols=80, rows=96, bias=True, dtype=torch.float32, **sizes):
    """An ``nn.Linear`` in tiers, with its mask."""
    return prune_tiers(nn.Linear(cols, rows, bias, dtype=dtype).eval(), **sizes)
