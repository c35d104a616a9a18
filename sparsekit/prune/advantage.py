"""How far to move from a mask: the advantage that its loss gives it, and the defaults that go with it."""

import math
from dataclasses import dataclass

LARGEST_MULTIPLIER = 28.0  # nm_policy_step_ takes an entry that is further below the largest one for 28 below


@dataclass
class Advantage:
    """Running statistics of the residuals, which are the losses of masks less that of one mask on the same batches.

    The advantage of a residual is its distance from the running mean, in units of the running deviation, so that it
    does not depend on the scale of the loss. The first residuals are averaged evenly, so that there is no transient,
    and a deviation holds the newest residual already: no advantage is larger than about 10.

    Args:
        tracker: the weight of the past in the running mean and deviation.
        normalize: whether to divide by the deviation. If not, the mean starts at 0 and holds the residual already, as
            in the published code.
        steps, mean, variance: the state.
    """

    tracker: float = 0.99
    normalize: bool = True
    steps: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def after(self, residual: float) -> "tuple[float, Advantage]":
        """Returns the advantage of a residual, and the statistics with it."""
        share = 1 - self.tracker if not self.normalize else max(1 - self.tracker, 1 / (self.steps + 1))
        centered = residual - self.mean
        mean, variance = self.mean + share * centered, (1 - share) * (self.variance + share * centered**2)
        advantage = residual - mean
        if self.normalize:
            advantage = centered / math.sqrt(variance) if variance > 0 else 0.0
        return advantage, Advantage(self.tracker, self.normalize, self.steps + 1, mean, variance)


def flip_probability(multiplier: float, n: int, m: int) -> float:
    """Returns the probability that a group draws another mask than the one whose kept entries have that logit."""
    rest = (m - n) * math.exp(-multiplier)  # the weight of all dropped entries, in units of a kept one
    return -math.expm1(-sum(math.log1p(rest / left) for left in range(1, n + 1)))


def multiplier_for(flips: float | None, groups: int, n: int, m: int) -> float:
    """Returns the logit of kept entries with which about ``flips`` of the groups draw another mask; up to 28.

    None is the square root of the number of groups, or half of what equal logits give if that is less.

    Raises:
        ValueError: as many groups do not draw another mask even if all logits are equal.
    """
    limit = groups * flip_probability(0, n, m)
    flips = min(math.sqrt(groups), limit / 2) if flips is None else flips
    if flips >= limit:
        raise ValueError(f"flips must be less than {limit:.6g}, what equal logits give in {groups} groups, got {flips}")
    low, high = 0.0, LARGEST_MULTIPLIER
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if flip_probability(middle, n, m) * groups > flips else (low, middle)
    return high


def lr_for(multiplier: float, n: int, m: int) -> float:
    """Returns the learning rate at which draws move a logit by the multiplier in about 200 steps.

    The rarer a group is drawn differently, the further each such draw moves it, by a quarter of the multiplier at most
    at an advantage of 1.
    """
    return multiplier * min(0.005 / flip_probability(multiplier, n, m), 0.25)
