"""How many groups the draws of ``MaskPro`` should change: measured, as models differ in it by orders of magnitude."""

import statistics
from collections.abc import Callable, Sequence

from torch import Tensor

from ..ops import nm_sample
from .advantage import flip_probability
from .mask_arena import MaskArena

MEASURED = 16  # draws that are measured
FEWEST = 1 / 30  # of the flips of the draws: fewer are not believed to follow from so few draws
FIRST_MEASURED = 2**62  # no step gets this far


def measured_flips(
    arena: MaskArena,
    multiplier: float,
    seed: int,
    residual: Callable[[Tensor, list[int]], float],
    indices: Callable[[int], list[int]],
) -> float:
    """Returns how many groups a draw should change, from the residuals of some draws.

    Args:
        arena: the logits of the initial mask, with that multiplier.
        multiplier: the logit of kept entries.
        seed: of the draws.
        residual: ``residual(bits, batches)`` returns how much worse than the initial mask another one is on batches.
        indices: ``indices(k)`` returns the batches of the k-th of the draws.
    """
    residuals = []
    for k in range(MEASURED):
        bits = nm_sample(arena.logits, arena.n, arena.m, seed=seed, offset=FIRST_MEASURED + k)
        residuals.append(residual(bits, indices(k)))
    return best_flips(flip_probability(multiplier, arena.n, arena.m) * arena.groups, residuals)


def best_flips(drawn: float, residuals: Sequence[float]) -> float:
    """Returns with how many flips draws are worse by their deviation, from residuals of draws with ``drawn`` flips.

    Then one draw in six is better than the initial mask. The mean residual of k flips is k times that of one, and the
    deviation sqrt(k) times. The result is from 1 to ``drawn``, or ``drawn`` if that is less than 1.
    """
    mean, deviation = statistics.fmean(residuals), statistics.stdev(residuals)
    factor = (deviation / mean) ** 2 if mean > 0 else 1.0
    return max(drawn * min(max(factor, FEWEST), 1.0), min(drawn, 1.0))
