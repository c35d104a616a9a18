"""ADMM: the weights that best stand in for the dense ones, with the mask growing as they settle."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..masks import Pattern
from ..ops import block_topk_mask
from .methods import Method
from .second_order import cholesky
from .statistics import Gram


@dataclass(frozen=True)
class ADMM(Method):
    """Finds mask and weights together by alternating between least squares and the pattern
    (https://arxiv.org/abs/2401.02938). Needs batches; the lowest layer error without a refinement.

    Inputs are scaled to the same norm first. The share of dropped weights grows as ``1 - (1 - t / ramp) ** 3`` over the
    first ``ramp`` iterations; with n:m only what a group would drop in the end is dropped on the way.

    Args:
        pattern: what to keep.
        iterations: alternations in all.
        ramp: those in which the mask still changes.
        damp: what is added to the diagonal of the normalized second moments; less fits the batches more closely, which
            pays where there are many tokens.

    Raises:
        ValueError: a pattern that is none, not ``0 < ramp <= iterations``, or ``damp`` is negative.
    """

    iterations: int = 20
    ramp: int = 15
    damp: float = 0.1

    statistic = Gram

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.ramp <= self.iterations or not 0 <= self.damp < math.inf:
            raise ValueError(
                f"ADMM needs 0 < ramp <= iterations and damp >= 0, got {self.ramp}, {self.iterations} and {self.damp}"
            )

    def prune(self, weight: Tensor, statistic: Gram) -> tuple[Tensor, Tensor]:
        gram, pattern = statistic.matrix, Pattern.parse(self.pattern)
        norm = gram.diagonal().sqrt().clamp(min=1e-8)
        gram = gram / norm / norm[:, None]
        gram.diagonal().add_(self.damp * gram.diagonal().mean())
        target = weight.flatten(1).float() * norm
        pull = target @ gram  # what least squares wants
        gram.diagonal().add_(1)
        factor = cholesky(gram, 0.0)
        current, dual = target.clone(), torch.zeros_like(target)
        mask = torch.ones_like(target, dtype=torch.bool)
        for step in range(1, self.iterations + 1):
            if step <= self.ramp:
                share = 1 - (1 - step / self.ramp) ** 3
                mask = _partly(pattern, (current + dual).view(weight.shape), share).flatten(1)
            sparse = torch.where(mask, current + dual, 0)
            dual += current - sparse
            current = torch.cholesky_solve((pull + sparse - dual).t(), factor).t()
        pruned = torch.where(mask, current + dual, 0) / norm
        return pruned.to(weight.dtype).view(weight.shape), mask.view(weight.shape)


def _partly(pattern: Pattern, score: Tensor, share: float) -> Tensor:
    """The pattern's mask with only ``share`` of what it drops dropped, the smallest: of every row, or of the layer."""
    mask = pattern.mask(score)
    if share >= 1:
        return mask
    rows = 1 if not pattern.m and pattern.unit != "row" else len(score)
    held = torch.where(mask, torch.inf, score.abs()).view(rows, -1)
    dropped = int(share * (~mask).view(rows, -1)[0].sum().item())
    return block_topk_mask(held, held.shape[1] - dropped, (1, held.shape[1])).view(score.shape)
