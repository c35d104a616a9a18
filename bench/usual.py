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


def multinomial_mask(logits: Tensor, n: int, m: int) -> Tensor:
    """Draws n of m entries of every group as MaskPro's published code does; returns the mask as numbers."""
    p = logits.view(-1, m).softmax(-1).clamp(min=1e-8)
    return torch.zeros_like(p).scatter_(1, p.multinomial(n), 1)


def multinomial_step(logits: Tensor, mask: Tensor, advantage: Tensor, lr: float, n: int, m: int) -> Tensor:
    """Updates the logits of a mask with n = 2 by the published formula, and draws the next mask."""
    p = logits.view(-1, m).softmax(-1).clamp(1e-8, 1)
    left = 1 / (mask / (1 - p + 1e-8)).sum(-1, keepdim=True)
    gradient = mask / p + left * mask / ((1 - p) ** 2 + 1e-8)
    logits.view(-1, m).sub_(lr * advantage * p * (gradient - (p * gradient).sum(-1, keepdim=True)))
    return multinomial_mask(logits, n, m)
