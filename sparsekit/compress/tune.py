"""Times what a layer could become against what it is."""

import copy
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .clock import Call, Clock

MIN_ROUNDS, MAX_ROUNDS = 9, 101
RATIO, WINS = 1.05, 0.8  # over the plain layer, from which a candidate is faster beyond doubt
PARITY_RATIO = 0.97  # from which it is no slower
MAX_SPREAD = 0.5  # a quiet machine shows 0.02 to 0.2
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}  # of the largest output


@dataclass(frozen=True)
class Timing:
    """One module against the plain layer, in calls that took turns.

    Args:
        seconds: median time of a call.
        ratio: median of the plain layer's time over this one's, pair by pair; above 1 is faster.
        wins: the share of the pairs in which this one was faster.
        best_dense: the same ratio against the dense module with the lowest median.
        spread: the interquartile range of the ratios over their median; of the plain layer, that of its own seconds,
            which is how much the machine was disturbed. Of two measurements that disagree, how far they are apart.
    """

    seconds: float
    ratio: float
    wins: float
    best_dense: float
    spread: float

    @property
    def faster(self) -> bool:
        """Whether it is faster than the plain layer beyond doubt."""
        return self.ratio >= RATIO and self.wins >= WINS

    @property
    def undecided(self) -> bool:
        """Whether it might be faster, but was measured on a machine too busy to tell."""
        return not self.faster and self.spread > MAX_SPREAD and self.ratio * (1 + self.spread) >= RATIO


Timings = dict[str, Timing | None]


def measure(
    calls: Mapping[str, Call], plain: nn.Module, x: Tensor, *, dense: tuple[str, ...], clock: Clock, budget: float
) -> Timings:
    """Times calls that compute the same on one input against a module, and checks what they compute against it.

    Rounds go on for ``budget`` seconds, with at least 9 and at most 101; the order changes from round to round. Every
    result is checked before and after, since some kernels are wrong now and then
    (https://github.com/pytorch/pytorch/issues/155333).

    Args:
        calls: what computes the same as ``plain``, by name.
        plain: the baseline and the reference.
        x: the input.
        dense: the names among which, with ``"plain"``, the best dense is chosen.
        clock: what times a call.
        budget: seconds.

    Returns:
        One ``Timing`` per name, ``"plain"`` first; None for a call that is wrong.
    """
    with torch.no_grad():
        exact = expected(plain, x)
        right = {name: call for name, call in calls.items() if is_right(call, x, exact)}
        times = time_interleaved({"plain": plain, **right}, x, clock, budget)
        for name, call in right.items():
            if not is_right(call, x, exact):
                del times[name]
    names = [name for name in ("plain", *dense) if name in times]
    best = min(names, key=lambda name: statistics.median(times[name]))
    return {
        name: compare(times[name], times["plain"], times[best]) if name in times else None for name in ("plain", *calls)
    }


def pessimistic(first: Timings, second: Timings) -> Timings:
    """Of two measurements of the same calls the one that says less for each.

    Its seconds are the mean of both, and where they disagree by more than the spread of either, so much is its spread.
    """

    def of(one: Timing | None, other: Timing | None) -> Timing | None:
        if one is None or other is None:
            return None
        least = min(one, other, key=lambda timing: (timing.faster, timing.ratio))
        low, high = sorted((one.ratio, other.ratio))
        spread = max(one.spread, other.spread, high / low - 1)
        return replace(least, seconds=(one.seconds + other.seconds) / 2, spread=spread)

    return {name: of(timing, second[name]) for name, timing in first.items()}


def compare(own: list[float], plain: list[float], best: list[float]) -> Timing:
    """The timing of one call, from the seconds of its rounds and of the plain and the best dense call's."""
    ratios = [other / mine for other, mine in zip(plain, own, strict=True)]
    return Timing(
        seconds=statistics.median(own),
        ratio=statistics.median(ratios),
        wins=statistics.fmean(mine < other for other, mine in zip(plain, own, strict=True)),
        best_dense=statistics.median(other / mine for other, mine in zip(best, own, strict=True)),
        spread=_spread(own if own is plain else ratios),
    )


def _spread(values: list[float]) -> float:
    low, median, high = statistics.quantiles(values, n=4)
    return (high - low) / median


def time_interleaved(
    calls: Mapping[str, Call], x: Any, clock: Clock, budget: float, least: int = MIN_ROUNDS
) -> dict[str, list[float]]:
    """The seconds of every call in every round, the calls in turns; one of them is called ``"plain"``.

    Rounds go on for ``budget`` seconds, with at least ``least`` and at most 101.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    clock.start(calls["plain"], x)
    names = list(calls)
    for done in range(MAX_ROUNDS):
        if done >= least and time.perf_counter() - begin > budget:
            break
        names = names[1:] + names[:1]
        for name in names:
            times[name].append(clock.seconds(calls[name], x))
    return times


def expected(plain: nn.Module, x: Tensor) -> Tensor:
    """What a right call gives for the rows that are checked, in float64."""
    return copy.deepcopy(plain).double()(_checked(x).double())


def is_right(call: Call, x: Tensor, exact: Tensor) -> bool:
    """Whether a call gives ``expected(plain, x)``, up to the rounding of its dtype."""
    difference = (_checked(call(x)).double() - exact).abs().amax()
    return bool(difference <= TOLERANCE[x.dtype] * exact.abs().amax())


def _checked(x: Tensor) -> Tensor:
    """Some rows, the first and the last among them: the whole product in float64 would take longer than the race."""
    count = 3 if x.device.type == "cpu" else 64
    return x[torch.linspace(0, len(x) - 1, min(count, len(x)), dtype=torch.float64, device=x.device).long()]
