"""Pruning in the loops of the published code: group by group, block by block, column by column."""

import torch
from torch import Tensor

from sparsekit.ops.tiers import DENSE, SPARSE24, TOPK


def wanda_by_groups(weight: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """Prunes to 2:4 by Wanda's score, one group of columns after another; returns the weight and its mask."""
    score, drop = weight.abs() * norm, torch.zeros(weight.shape, dtype=torch.bool)
    for first in range(0, weight.shape[1], 4):
        drop.scatter_(1, first + score[:, first : first + 4].topk(2, largest=False).indices, True)
    return weight.masked_fill(drop, 0), ~drop


def tiers_by_blocks(
    weight: Tensor, norm: Tensor, tiers: Tensor, target: tuple[float, float, float], k: int, side: int = 16
) -> tuple[Tensor, Tensor]:
    """Runs one iteration of the published three-tier pruner on whole blocks; returns the weight and its tiers."""
    weight, tiers, score = weight.clone(), tiers.clone(), weight.abs() * norm
    blocks = [(row, col) for row in range(tiers.shape[0]) for col in range(tiers.shape[1])]

    def cheapest(tier: int, share: float) -> list[tuple[int, int]]:
        found = []
        for row, col in blocks:
            if tiers[row, col].item() == tier:
                at = slice(row * side, (row + 1) * side), slice(col * side, (col + 1) * side)
                found.append(((score[at] * (weight[at] != 0)).sum().item(), row, col))
        return [where for _, *where in sorted(found)[: int(len(blocks) * (len(found) / len(blocks) - share))]]

    for row, col in cheapest(DENSE, target[0]):
        at = slice(row * side, (row + 1) * side), slice(col * side, (col + 1) * side)
        groups = weight[at].flatten().view(-1, 4)
        mask = torch.zeros_like(groups).scatter_(1, groups.abs().topk(2, dim=1).indices, 1)
        weight[at] = (groups * mask).view(side, side)
        tiers[row, col] = SPARSE24
    for row, col in cheapest(SPARSE24, target[1]):
        at = slice(row * side, (row + 1) * side), slice(col * side, (col + 1) * side)
        block = weight[at].flatten()
        mask = torch.zeros_like(block).scatter_(0, block.abs().topk(k).indices, 1)
        weight[at] = (block * mask).view(side, side)
        tiers[row, col] = TOPK
    return weight, tiers


def sparsegpt_by_columns(weight: Tensor, gram: Tensor, damp: float = 0.01, columns: int = 128) -> tuple[Tensor, Tensor]:
    """Prunes to 2:4 by SparseGPT, one column after another; returns the weight and its mask.

    Like the published code, it also sums up the loss.
    """
    weight, gram = weight.clone(), gram + damp * gram.diagonal().mean() * torch.eye(len(gram))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    factor = torch.linalg.cholesky(inverse, upper=True)
    kept, loss = torch.ones_like(weight, dtype=torch.bool), torch.zeros(())
    for start in range(0, weight.shape[1], columns):
        end = min(start + columns, weight.shape[1])
        part, inner = weight[:, start:end].clone(), factor[start:end, start:end]
        pruned, errors, losses = (torch.zeros_like(part) for _ in range(3))
        drop = torch.zeros_like(part, dtype=torch.bool)
        for col in range(end - start):
            if col % 4 == 0:
                score = part[:, col : col + 4].square() / inner.diagonal()[col : col + 4].square()
                drop.scatter_(1, col + score.topk(2, dim=1, largest=False).indices, True)
            column, scale = part[:, col], inner[col, col]
            rest = column.clone()
            rest[drop[:, col]] = 0
            pruned[:, col] = rest
            losses[:, col] = (column - rest) ** 2 / scale**2
            error = (column - rest) / scale
            part[:, col:] -= error[:, None] @ inner[None, col, col:]
            errors[:, col] = error
        weight[:, start:end], kept[:, start:end] = pruned, ~drop
        loss += losses.sum() / 2
        weight[:, end:] -= errors @ factor[start:end, end:]
    assert torch.isfinite(loss)
    return weight, kept
