"""SparseGPT: drop column after column, and let the later columns make up for it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..masks import Pattern
from ..ops import sparsegpt_block
from .methods import Method
from .second_order import upper_factor
from .statistics import Gram


@dataclass(frozen=True)
class SparseGPT(Method):
    """Drops weights column by column and updates the later ones to make up for each
    (https://arxiv.org/abs/2301.00774). Needs batches; its layer error is below ``Wanda``'s.

    An input that is always zero loses its weights. ``"p%"`` patterns are chosen within every block of columns, by the
    weights as they are when the block is reached.

    Args:
        pattern: what to keep.
        damp: what is added to the diagonal of the second moments, as a share of its mean; more is more careful.
        block: how many columns are updated at a time before the rest of the weight is; speed, not quality, for n:m.

    Raises:
        ValueError: a pattern that is none, ``damp`` is negative or ``block`` not positive.
    """

    damp: float = 0.01
    block: int = 128

    statistic = Gram

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.damp < math.inf or self.block < 1:
            raise ValueError(f"SparseGPT needs damp >= 0 and block >= 1, got {self.damp} and {self.block}")

    def prune(self, weight: Tensor, statistic: Gram) -> tuple[Tensor, Tensor]:
        gram, pattern = statistic.matrix, Pattern.parse(self.pattern)
        factor = upper_factor(gram, self.damp)
        dense = weight.flatten(1).float().masked_fill(gram.diagonal() == 0, 0)
        pruned, lost, mask = torch.empty_like(dense), torch.empty_like(dense), torch.empty_like(dense, dtype=torch.bool)
        for start, end in self._blocks(pattern, dense.shape[1], weight.shape[-1]):
            block = slice(start, end)
            inner = _inverse(factor[block, block])
            # What the columns before ask of these is lost @ R[before, block] @ R[block, block]^-1, with H = R @ R.T: no
            # inverse of H is needed, which would be most of the time from 2048 columns on.
            columns = torch.addmm(dense[:, block], lost[:, :start] @ factor[:start, block], inner)
            kept = None if pattern.m else pattern.mask(columns / inner.diagonal())
            pruned[:, block], _, mask[:, block] = sparsegpt_block(
                columns, inner, mask=kept, n=pattern.n or 1, m=pattern.m or 1
            )
            lost[:, block] = dense[:, block] - pruned[:, block]
        return pruned.to(weight.dtype).view(weight.shape), mask.view(weight.shape)

    def _blocks(self, pattern: Pattern, inputs: int, cols: int) -> list[tuple[int, int]]:
        """Where blocks of columns begin and end; groups start anew with every kernel position of a convolution."""
        unit = pattern.m or (pattern.unit[1] if isinstance(pattern.unit, tuple) else 1)
        size = max(self.block // unit, 1) * unit
        span = cols if pattern.m else inputs
        return [
            (first + start, first + min(start + size, span))
            for first in range(0, inputs, span)
            for start in range(0, span, size)
        ]


def _inverse(upper: Tensor) -> Tensor:
    eye = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    return torch.linalg.solve_triangular(upper, eye, upper=True)
