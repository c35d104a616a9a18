"""Noise schedules of absorbing diffusion: how likely a token is masked at a time from 0 to 1."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Noise(ABC):
    """A schedule under which each token is masked independently of the others, with a probability that rises.

    A schedule of your own gives ``total`` and ``rate``. Times are floating-point tensors, of any shape; results have
    their shape and dtype.
    """

    @abstractmethod
    def total(self, t: Tensor) -> Tensor:
        """Returns the noise up to a time: a token is left with probability ``exp(-total)``."""

    @abstractmethod
    def rate(self, t: Tensor) -> Tensor:
        """Returns the derivative of ``total`` by the time."""

    def mask_probability(self, t: Tensor) -> Tensor:
        """Returns the probability that a token is masked, ``1 - exp(-total)``; papers call it lambda."""
        return -torch.expm1(-self.total(t))

    def score_factor(self, t: Tensor) -> Tensor:
        """Returns ``r = 1 / (exp(total) - 1)``: the score of a masked token is this times its probability."""
        return 1 / torch.expm1(self.total(t))

    def loss_weight(self, t: Tensor) -> Tensor:
        """Returns ``rate * score_factor``, by which the losses over the time weight the cross-entropy."""
        return self.rate(t) * self.score_factor(t)


@dataclass(frozen=True)
class LogLinearNoise(Noise):
    """The schedule whose mask probability is proportional to the time: ``(1 - eps) t``.

    Args:
        eps: the probability that a token is left at time 1; 1e-3 as published.

    Raises:
        ValueError: ``eps`` is not from 0 to below 1.
    """

    eps: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 <= self.eps < 1:
            raise ValueError(f"eps must be from 0 to below 1, got {self.eps}")

    def total(self, t: Tensor) -> Tensor:
        """Returns ``-log(1 - (1 - eps) t)``."""
        return -torch.log1p(-(1 - self.eps) * t)

    def rate(self, t: Tensor) -> Tensor:
        """Returns ``(1 - eps) / (1 - (1 - eps) t)``."""
        return (1 - self.eps) / (1 - (1 - self.eps) * t)

    def mask_probability(self, t: Tensor) -> Tensor:
        """Returns ``(1 - eps) t``."""
        return (1 - self.eps) * t

    def loss_weight(self, t: Tensor) -> Tensor:
        """Returns ``1 / t``, which is exact for every ``eps``."""
        return 1 / t


@dataclass(frozen=True)
class GeometricNoise(Noise):
    """The schedule whose total noise grows by a constant factor: ``sigma_min^(1 - t) sigma_max^t``.

    Args:
        sigma_min: the total noise at time 0; 1e-4 as published.
        sigma_max: the total noise at time 1; with 20, as published, 2e-9 of the tokens are left.

    Raises:
        ValueError: the noise does not rise from above 0.
    """

    sigma_min: float = 1e-4
    sigma_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"noise must rise from above 0, got {self.sigma_min} to {self.sigma_max}")

    def total(self, t: Tensor) -> Tensor:
        """Returns ``sigma_min^(1 - t) sigma_max^t``."""
        return self.sigma_min * torch.exp(t * math.log(self.sigma_max / self.sigma_min))

    def rate(self, t: Tensor) -> Tensor:
        """Returns ``total`` times ``log(sigma_max / sigma_min)``."""
        return self.total(t) * math.log(self.sigma_max / self.sigma_min)
