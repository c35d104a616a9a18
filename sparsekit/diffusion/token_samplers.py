"""Samplers of masked tokens whose turns are planned: by the steps of absorbing diffusion, or in an order."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from .noise import LogLinearNoise, Noise
from .order import Order, order_turns
from .token_sampler import PlannedSampler


@dataclass(frozen=True)
class DiffusionSampler(PlannedSampler):
    """The sampler of absorbing diffusion, which evaluates a row only in steps in which one of its tokens is unmasked.

    In which step a position is unmasked depends on no token, so that it is drawn first. Of ``n`` steps and ``l`` masked
    positions that leaves ``n (1 - (1 - 1/n)^l)`` evaluations in the mean under log-linear noise, and never more than
    ``l``; the samples have the distribution of those of all ``n``. Many steps are exact but for the model, while
    tokens that are unmasked in one step are drawn independently of each other.

    Args:
        steps: the number of steps.
        noise: the schedule; log-linear by default.
        method: the probability of a step: ``"tweedie"`` that of the reversed process, ``"euler"`` its first order. They
            are the same under log-linear noise.
        last_t: the time of the last step, in which what is left is unmasked; published samplers have 1e-5.

    Raises:
        ValueError: an option is out of range.

    Source: Ou et al., 2024, https://arxiv.org/abs/2406.03736, who evaluate the first step as well.
    """

    steps: int
    noise: Noise = LogLinearNoise()  # noqa: RUF009
    method: Literal["tweedie", "euler"] = "tweedie"
    last_t: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.method not in ("tweedie", "euler"):
            raise ValueError(f"method must be tweedie or euler, got {self.method!r}")
        if not 0 <= self.last_t < 1:
            raise ValueError(f"last_t must be from 0 to below 1, got {self.last_t}")

    @cached_property
    def step_probabilities(self) -> Tensor:
        """The probability of each step that a position is unmasked in it, float64 ``[steps]`` on the CPU."""
        t = torch.linspace(1, self.last_t, self.steps + 1, dtype=torch.float64, device="cpu")
        if self.method == "tweedie":
            masked = self.noise.mask_probability(t)
            unmasks = 1 - masked[1:] / masked[:-1]
        else:
            unmasks = ((1 - self.last_t) / self.steps * self.noise.loss_weight(t[:-1])).clamp(max=1)
        left = torch.cat((torch.ones_like(t[:1]), (1 - unmasks[:-1]).cumprod(0)))
        return torch.cat((left[:-1] * unmasks[:-1], left[-1:]))

    def expected_evaluations(self, free: int) -> float:
        """Returns the mean of the number of evaluations of a row with this many masked positions."""
        return float((1 - (1 - self.step_probabilities) ** free).sum())

    def _times(self, keys: Tensor) -> Tensor:
        ends = self.step_probabilities.cumsum(0)[:-1].to(keys.device)
        return torch.searchsorted(ends, keys.contiguous(), right=True)


@dataclass(frozen=True)
class OrderedSampler(PlannedSampler):
    """The sampler that fills one position after the other: exact but for the model, with an evaluation for each.

    Args:
        order: ``"forward"``, ``"backward"``, ``"random"`` (one for each row, from its seed), or all positions of a row
            in their order; given tokens are left out.
    """

    order: Order = "forward"

    def _times(self, keys: Tensor) -> Tensor:
        return order_turns(self.order, keys)
