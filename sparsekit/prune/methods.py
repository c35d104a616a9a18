"""Pruning methods: choose what to keep of one weight, given a statistic of its inputs."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..masks import Pattern
from .calibration.statistics import InputNorm, Statistic


@dataclass(frozen=True)
class Method(ABC):
    """Base class of pruning methods. A subclass defines ``prune`` and names the ``statistic`` that it needs, if any.

    Args:
        pattern: what to keep: ``"2:4"`` (2 of every 4 inputs; any ``0 < n <= m <= 32``) or ``"50%"`` (drop half of
            every output's weights).

    Raises:
        ValueError: ``pattern`` is not such a rule.
    """

    pattern: str
    statistic: ClassVar[type[Statistic] | None] = None

    def __post_init__(self) -> None:
        if Pattern.parse(self.pattern).tiers:
            raise ValueError(f"{self.pattern!r} is what progressive_tiers leaves, not a rule to prune by")

    @abstractmethod
    def prune(self, weight: Tensor, statistic: Any) -> tuple[Tensor, Tensor]:
        """Returns ``(pruned, mask)`` of a weight, which stays untouched.

        Args:
            weight: ``[outputs, ..., cols]``, groups along the last dimension, any strides. A Conv2d weight comes as
                ``[outputs, height, width, channels]``, or flattened as ``[outputs, inputs]``.
            statistic: the layer's ``self.statistic`` after all batches; None where that is None.

        Returns:
            The new weight, and the bool mask that says what is kept; both of ``weight``'s shape. Kept weights may
            have changed, dropped ones are zero.
        """


@dataclass(frozen=True)
class Magnitude(Method):
    """Keeps the largest magnitudes. Needs no batches."""

    def prune(self, weight: Tensor, statistic: None) -> tuple[Tensor, Tensor]:
        return Pattern.parse(self.pattern).prune(weight)


@dataclass(frozen=True)
class Wanda(Method):
    """Keeps the largest products of magnitude and input norm (https://arxiv.org/abs/2306.11695). Needs batches.

    It is about as fast as ``Magnitude``, and far better on language models, whose inputs have outlier channels, where
    magnitude pruning fails.

    The norm is the root mean square of an input over all tokens, or of an input channel over all pixels. On
    convolutional networks it ranks little better than ``Magnitude``, and leaves the statistics of BatchNorm more wrong:
    a ResNet-20 at 2:4 classifies 36 % of CIFAR-10 correctly with the old statistics (``Magnitude`` 55 %, dense 81 %)
    and 72 % with new ones (``Magnitude`` 72 %), which ``prune_`` estimates by itself. For a network with other norms
    compare both, or use a method that updates weights, such as ``SparseGPT``.
    """

    statistic = InputNorm

    def prune(self, weight: Tensor, statistic: InputNorm) -> tuple[Tensor, Tensor]:
        return Pattern.parse(self.pattern).prune(weight, statistic.norm)


@dataclass(frozen=True)
class RIA(Method):
    """Keeps the largest relative importance times a power of the input norm. Needs batches.

    The relative importance of a weight is its share of its input's and of its output's weights (RIA,
    https://openreview.net/forum?id=Tr0lPx9woF). The score is
    ``(|w| / sum of its column + |w| / sum of its row) * norm ** power``.

    Args:
        pattern: what to keep.
        power: how much the norms count; 0.5 as in the paper.

    Raises:
        ValueError: ``pattern`` is not a pattern, or ``power`` is negative or infinite.
    """

    power: float = 0.5
    statistic = InputNorm

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.power < math.inf:
            raise ValueError(f"RIA needs power >= 0, got {self.power}")

    def prune(self, weight: Tensor, statistic: InputNorm) -> tuple[Tensor, Tensor]:
        size = weight.flatten(1).float().abs()
        importance = _share(size, 0) + _share(size, 1)
        mask = Pattern.parse(self.pattern).mask(importance.view(weight.shape) * statistic.norm**self.power)
        return torch.where(mask, weight, 0), mask


def _share(size: Tensor, dim: int) -> Tensor:
    total = size.sum(dim, keepdim=True)
    return torch.where(total > 0, size / total, 0)
