"""How the losses of two models differ on the same examples, and whether that may be chance."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .classification import NORMAL_95


@dataclass(frozen=True)
class PairedDifference:
    """How much larger the values of one model are than those of another on the same examples.

    Args:
        mean: the mean difference; losses of the first are lower if it is negative.
        interval: its 95 % interval, by the normal approximation.
        p: the probability of at least as large a difference, up or down, if the means were equal, likewise.
        n: the number of examples.
    """

    mean: float
    interval: tuple[float, float]
    p: float
    n: int


def paired_difference(values: Tensor, others: Tensor) -> PairedDifference:
    """Compares values, such as losses, of two models on the same examples.

    The mean of the differences is taken for normal, with their standard deviation, which holds for about 30 examples
    and more; for fewer the interval and p are too small. If all differences are equal, p is 1 for 0 and else 0.

    Args:
        values: of the first model, ``[examples]``.
        others: of the second model, of the same examples in the same order.

    Raises:
        ValueError: they are not two vectors of the same length, at least 2, or not finite.
    """
    if values.dim() != 1 or values.shape != others.shape or len(values) < 2:
        raise ValueError(
            f"both need one value for each example, of at least 2, got {tuple(values.shape)} and {tuple(others.shape)}"
        )
    more = values.detach().cpu().double() - others.detach().cpu().double()
    if not torch.isfinite(more).all():
        raise ValueError("all values must be finite")
    mean, error = more.mean().item(), more.std().item() / math.sqrt(len(more))
    half = NORMAL_95 * error
    p = math.erfc(abs(mean) / error / math.sqrt(2)) if error else float(mean == 0)
    return PairedDifference(mean, (mean - half, mean + half), p, len(more))
