"""Rows of any length, written block by block."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .absorbing import MaskedModel
from .token_sampler import Progress, TokenSampler


@dataclass(frozen=True)
class BlockSampler(TokenSampler):
    """A sampler that fills a row block by block from left to right, each by another sampler, for rows of any length.

    The model sees the last ``context`` positions up to the end of the block. Where the row is shorter than that so far,
    it sees its first ``context`` positions, with those after the block still masked. A token that is written stays as
    it is, and a block without masked positions is not evaluated.

    Args:
        sampler: fills each block.
        block: the number of positions in a block.
        context: how many positions the model sees; at least ``block``, and the length of its training rows as a rule.

    Raises:
        ValueError: the block is empty or longer than the context.
    """

    sampler: TokenSampler
    block: int
    context: int

    def __post_init__(self) -> None:
        if not 1 <= self.block <= self.context:
            raise ValueError(f"block must be from 1 to the context of {self.context}, got {self.block}")

    def _fill(
        self, model: MaskedModel, tokens: Tensor, free: Tensor, uniforms: Tensor, progress: Progress = iter
    ) -> Tensor:
        length = tokens.shape[1]
        evaluations = torch.zeros_like(tokens[:, 0])
        for start in progress(range(0, length, self.block)):
            end = min(start + self.block, length)
            high = max(end, min(self.context, length))
            low = max(0, high - self.context)
            now = free[:, low:high].clone()
            now[:, : start - low] = False
            now[:, end - low :] = False
            window = tokens[:, low:high]  # a view, which is filled in place
            evaluations += self.sampler._fill(model, window, now, uniforms[:, low:high])
        return evaluations
