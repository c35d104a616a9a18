"""Times calls in turns, so that what disturbs one disturbs all."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

MIN_ROUNDS, MAX_ROUNDS = 5, 101
SHORTEST = 200e-6  # seconds; a shorter call is timed several at a time

T = TypeVar("T")
Calls = dict[str, Callable[[], object]]
Times = dict[str, list[float]]


def take_turns(calls: Mapping[str, Callable[[], T]], budget: float, least: int, most: int) -> dict[str, list[T]]:
    """Calls in rotating order, ``least`` to ``most`` rounds, for ``budget`` seconds; returns what each call gave."""
    results: dict[str, list[T]] = {key: [] for key in calls}
    order, begin = list(calls), time.perf_counter()
    for done in range(most):
        if done >= least and time.perf_counter() - begin > budget:
            break
        order = order[1:] + order[:1]
        for key in order:
            results[key].append(calls[key]())
    return results


def time_interleaved(calls: Calls, budget: float = 1.0, least: int = MIN_ROUNDS) -> Times:
    """Returns seconds per call: ``least`` to 101 rounds, for ``budget`` seconds, in rotating order."""
    timed = {}
    for key, call in calls.items():
        call()
        timed[key] = partial(_seconds, call, max(1, math.ceil(SHORTEST / _seconds(call, 1))))
    return take_turns(timed, budget, least, MAX_ROUNDS)


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    return {key: statistics.median(each) for key, each in times.items()}


def spread(times: Sequence[float]) -> float:
    """Returns the interquartile range of times over their median."""
    low, median, high = statistics.quantiles(times, n=4)
    return (high - low) / median


def ratio(times: Mapping[str, list[float]], key: str, baseline: str) -> float:
    """Returns how many times faster ``key`` is than ``baseline``: the median over the rounds."""
    return statistics.median(slow / fast for slow, fast in zip(times[baseline], times[key], strict=True))


def _seconds(call: Callable[[], object], repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats
