"""Decoding by confidence: the fast option, which draws nothing."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .absorbing import MaskedModel, predict
from .token_sampler import Progress, TokenSampler


@dataclass(frozen=True)
class ConfidenceSampler(TokenSampler):
    """A decoder that takes, in each turn, the likeliest token at all positions where the model is sure of it.

    It is fast and no sampler of the model's distribution: seeds change nothing, and long texts tend to repeat
    themselves. Each turn fills at least the position at which the model is surest.

    Args:
        threshold: the probability from which the model counts as sure. Above 1 each turn fills one position.

    Raises:
        ValueError: the threshold is not above 0.
    """

    threshold: float = 0.9

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ValueError(f"threshold must be above 0, got {self.threshold}")

    def _fill(
        self, model: MaskedModel, tokens: Tensor, free: Tensor, uniforms: Tensor, progress: Progress = iter
    ) -> Tensor:
        free, evaluations = free.clone(), torch.zeros_like(tokens[:, 0])
        for _ in progress(range(tokens.shape[1])):
            rows = free.any(1).nonzero()[:, 0]
            if not len(rows):
                break
            asked, seen = free[rows], tokens[rows]
            log_probs, likeliest = predict(model, seen, asked, int(asked.sum())).max(1)
            sure = torch.full(asked.shape, -torch.inf, dtype=log_probs.dtype, device=log_probs.device)
            sure = sure.masked_scatter(asked, log_probs).exp()
            taken = (sure >= self.threshold).scatter(1, sure.argmax(1, keepdim=True), True) & asked
            seen[taken] = torch.zeros_like(seen).masked_scatter(asked, likeliest)[taken]
            tokens[rows], free[rows] = seen, asked & ~taken
            evaluations[rows] += 1
        return evaluations
