"""SparseGPT: drops weights column after column and updates the later columns to make up for them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..masks import Pattern
from ..ops import sparsegpt_columns
from .calibration.statistics import Gram
from .methods import Method
from .second_order import upper_factor


@dataclass(frozen=True)
class SparseGPT(Method):
    """A method that drops weights column by column and updates the later columns to make up for it. Needs batches.

    Its layer error is below ``Wanda``'s (https://arxiv.org/abs/2301.00774). The weights of an input that is always zero
    become zero. With a ``"p%"`` pattern, the mask of every ``columns`` columns is chosen by the weights as they have
    been updated until then.

    Args:
        pattern: what to keep.
        damp: how much is added to the diagonal of the Gram matrix, as a share of its mean; more changes weights less.
        columns: how many columns are pruned before the rest of the weight is updated; for n:m this changes the speed,
            not the result.

    Raises:
        ValueError: ``pattern`` is not a pattern, ``damp`` is negative or ``columns`` not positive.
    """

    damp: float = 0.01
    columns: int = 128

    statistic = Gram

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.damp < math.inf or self.columns < 1:
            raise ValueError(f"SparseGPT needs damp >= 0 and columns >= 1, got {self.damp} and {self.columns}")

    def prune(self, weight: Tensor, statistic: Gram) -> tuple[Tensor, Tensor]:
        gram, pattern = statistic.matrix, Pattern.parse(self.pattern)
        factor = upper_factor(gram, self.damp)
        dense = weight.flatten(1).float().masked_fill(gram.diagonal() == 0, 0)
        pruned, lost, mask = torch.empty_like(dense), torch.empty_like(dense), torch.empty_like(dense, dtype=torch.bool)
        for start, end in self._spans(pattern, dense.shape[1], weight.shape[-1]):
            span = slice(start, end)
            inner = _inverse(factor[span, span])
            # With H = R @ R.T, the earlier columns change these by lost @ R[before, span] @ R[span, span]^-1. So H is
            # never inverted, which would take most of the time from 2048 columns on.
            updated = torch.addmm(dense[:, span], lost[:, :start] @ factor[:start, span], inner)
            kept = None if pattern.m else pattern.mask(updated / inner.diagonal())
            pruned[:, span], _, mask[:, span] = sparsegpt_columns(
                updated, inner, mask=kept, n=pattern.n or 1, m=pattern.m or 1
            )
            lost[:, span] = dense[:, span] - pruned[:, span]
        return pruned.to(weight.dtype).view(weight.shape), mask.view(weight.shape)

    def _spans(self, pattern: Pattern, inputs: int, cols: int) -> list[tuple[int, int]]:
        """Returns start and end of each span of columns; no span crosses a kernel position of a convolution."""
        unit = pattern.m or (pattern.unit[1] if isinstance(pattern.unit, tuple) else 1)
        size = max(self.columns // unit, 1) * unit
        whole = cols if pattern.m else inputs
        return [
            (first + start, first + min(start + size, whole))
            for first in range(0, inputs, whole)
            for start in range(0, whole, size)
        ]


def _inverse(upper: Tensor) -> Tensor:
    eye = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    return torch.linalg.solve_triangular(upper, eye, upper=True)
