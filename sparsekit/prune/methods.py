"""Pruning methods, which choose the entries of one weight to keep, by a statistic of the layer's inputs."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..masks import Pattern
from .calibration.statistics import InputNorm, Statistic
from .layers import PrunableLayer


@dataclass(frozen=True)
class Method(ABC):
    """Base class of pruning methods. A subclass defines ``prune`` and names the ``statistic`` that it needs, if any.

    Args:
        pattern: which weights to keep: ``"2:4"`` keeps 2 of every 4 inputs (any ``0 < n <= m <= 32``), ``"50%"`` drops
            half of the weights of every output; ``masks.Pattern`` lists all patterns.

    Raises:
        ValueError: ``pattern`` is not such a pattern.
    """

    pattern: str
    statistic: ClassVar[type[Statistic] | None] = None

    def __post_init__(self) -> None:
        if Pattern.parse(self.pattern).tiers:
            raise ValueError(f"{self.pattern!r} is what progressive_tiers leaves, not a rule to prune by")

    def for_layer(self, layer: PrunableLayer) -> "Method":
        """Returns the method as it prunes one layer or expert; here, itself.

        It is called for all layers before the first one is pruned, so that an error leaves the model as it is.
        """
        return self

    def without_inputs(self) -> "Method":
        """Returns the method for an expert that no token reached; here, by magnitude."""
        return Magnitude(self.pattern)

    @abstractmethod
    def prune(self, weight: Tensor, statistic: Any) -> tuple[Tensor, Tensor]:
        """Returns ``(pruned, mask)`` for a weight, which is not changed.

        Args:
            weight: ``[outputs, ..., cols]``, groups along the last dimension, any strides. A Conv2d weight comes as
                ``[outputs, height, width, channels]``, or flattened as ``[outputs, inputs]``.
            statistic: an object of the class ``self.statistic`` that has seen all inputs of the layer; None if that
                class is None.

        Returns:
            The new weight, and a bool mask that is True for kept weights; both of ``weight``'s shape. Kept weights may
            have new values, dropped ones are zero.
        """


@dataclass(frozen=True)
class Magnitude(Method):
    """A method that keeps the weights of largest magnitude. Needs no batches."""

    def prune(self, weight: Tensor, statistic: None) -> tuple[Tensor, Tensor]:
        return Pattern.parse(self.pattern).prune(weight)


@dataclass(frozen=True)
class Wanda(Method):
    """A method that keeps the weights with the largest product of magnitude and input norm. Needs batches.

    The input norm is the root mean square of an input over all tokens, or of an input channel over all pixels
    (https://arxiv.org/abs/2306.11695). The method is about as fast as ``Magnitude``, and far better on language models:
    some of their input channels are outliers, where pruning by magnitude fails.

    On convolutional networks it is hardly better than ``Magnitude``, and changes the inputs of BatchNorm more: a
    ResNet-20 at 2:4 classifies 36 % of CIFAR-10 correctly with the old BatchNorm statistics (``Magnitude`` 55 %, dense
    81 %) and 72 % with new ones (``Magnitude`` 72 %), which ``prune_`` estimates by itself. For a network with other
    normalization compare both, or use a method that updates weights, such as ``SparseGPT``.
    """

    statistic = InputNorm

    def prune(self, weight: Tensor, statistic: InputNorm) -> tuple[Tensor, Tensor]:
        return Pattern.parse(self.pattern).prune(weight, statistic.norm)


@dataclass(frozen=True)
class RIA(Method):
    """A method that keeps the weights of largest relative importance times a power of the input norm. Needs batches.

    The relative importance of a weight is its share of all weights of its input plus its share of all weights of its
    output (RIA, https://openreview.net/forum?id=Tr0lPx9woF). The score is
    ``(|w| / sum of its column + |w| / sum of its row) * norm ** power``.

    Args:
        pattern: what to keep.
        power: how much the norms count; the paper uses 0.5.

    Raises:
        ValueError: ``pattern`` is not a pattern, or ``power`` is negative, infinite or NaN.
    """

    power: float = 0.5
    statistic = InputNorm

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.power < math.inf:
            raise ValueError(f"RIA needs a finite power >= 0, got {self.power}")

    def prune(self, weight: Tensor, statistic: InputNorm) -> tuple[Tensor, Tensor]:
        size = weight.flatten(1).float().abs()
        importance = _share(size, 0) + _share(size, 1)
        mask = Pattern.parse(self.pattern).mask(importance.view(weight.shape) * statistic.norm**self.power)
        return torch.where(mask, weight, 0), mask


def _share(size: Tensor, dim: int) -> Tensor:
    total = size.sum(dim, keepdim=True)
    return torch.where(total > 0, size / total, 0)
