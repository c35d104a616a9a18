"""Masks and scores as they are usually written in PyTorch."""

import torch
from torch import Tensor


def topk_scatter(score: Tensor, n: int, m: int) -> Tensor:
    """Returns the N:M mask as it is usually written."""
    groups = score.abs().view(-1, m)
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.topk(n).indices, True).view(score.shape)


def topk_prune(weight: Tensor, n: int, m: int, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Prunes by a score to N:M as it is usually written; returns the weight and its mask."""
    mask = topk_scatter(weight.abs() * scale, n, m)
    return weight * mask, mask


def block_topk(score: Tensor, k: int, side: int = 16) -> Tensor:
    """Returns the mask of the k best entries of every block as it is usually written."""
    rows, cols = score.shape
    blocks = score.abs().view(rows // side, side, cols // side, side).transpose(1, 2).reshape(-1, side * side)
    mask = torch.zeros_like(blocks, dtype=torch.bool).scatter_(1, blocks.topk(k).indices, True)
    return mask.view(rows // side, cols // side, side, side).transpose(1, 2).reshape(rows, cols)


def block_sums(weight: Tensor, scale: Tensor, side: int = 16) -> Tensor:
    """Returns the scores of blocks as they are usually written."""
    rows, cols = weight.shape
    return (weight.abs() * scale).view(rows // side, side, cols // side, side).sum((1, 3))


def rank_mask24(score: Tensor) -> Tensor:
    """Returns the 2:4 mask by six comparisons, the fastest plain torch code; ties keep the lower index."""
    a, b, c, d = score.abs().view(-1, 4).unbind(1)
    ab, ac, ad, bc, bd, cd = a >= b, a >= c, a >= d, b >= c, b >= d, c >= d
    wins = (
        ab.int() + ac.int() + ad.int(),
        (~ab).int() + bc.int() + bd.int(),
        (~ac).int() + (~bc).int() + cd.int(),
        (~ad).int() + (~bd).int() + (~cd).int(),
    )
    return torch.stack([won >= 2 for won in wins], 1).view(score.shape)
