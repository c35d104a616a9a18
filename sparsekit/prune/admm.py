"""ADMM: alternates between the best weights and the pattern, and drops more weights step by step."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..masks import Pattern
from ..ops import block_topk_mask
from .calibration.statistics import Gram
from .methods import Method
from .second_order import cholesky


@dataclass(frozen=True)
class ADMM(Method):
    """A method that alternates between least squares and the pattern to find mask and weights together. Needs batches.

    Its layer error is the lowest of all methods without a refinement (https://arxiv.org/abs/2401.02938).

    It first scales all inputs to the same norm. In iteration ``t`` of the first ``ramp`` ones, it drops a share
    ``1 - (1 - t / ramp) ** 3`` of the weights that the full pattern would drop: the smallest of them.

    Args:
        pattern: what to keep.
        iterations: the number of iterations.
        ramp: the number of iterations in which the mask still changes.
        damp: how much is added to the diagonal of the normalized Gram matrix, as a share of its mean; less fits the
            batches more closely, which is better if there are many tokens.

    Raises:
        ValueError: ``pattern`` is not a pattern, not ``0 < ramp <= iterations``, or ``damp`` is negative.
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
        target_gram = target @ gram  # the right-hand side of the least squares problem
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
            current = torch.cholesky_solve((target_gram + sparse - dual).t(), factor).t()
        pruned = torch.where(mask, current + dual, 0) / norm
        return pruned.to(weight.dtype).view(weight.shape), mask.view(weight.shape)


def _partly(pattern: Pattern, score: Tensor, share: float) -> Tensor:
    """Returns a mask that drops only a ``share`` of what the pattern drops: the smallest of each row or layer."""
    mask = pattern.mask(score)
    if share >= 1:
        return mask
    rows = 1 if not pattern.m and pattern.unit != "row" else len(score)
    held = torch.where(mask, torch.inf, score.abs()).view(rows, -1)
    dropped = int(share * (~mask).view(rows, -1)[0].sum().item())
    return block_topk_mask(held, held.shape[1] - dropped, (1, held.shape[1])).view(score.shape)
