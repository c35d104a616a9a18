"""Times calls in turns, so that what disturbs one disturbs all."""

import math
import statistics
import time
from collections.abc import Callable

MIN_ROUNDS, MAX_ROUNDS = 5, 101
SHORTEST = 200e-6  # seconds; a shorter call is timed several at a time

Calls = dict[str, Callable[[], object]]
Times = dict[str, list[float]]


def time_interleaved(calls: Calls, budget: float = 1.0, least: int = MIN_ROUNDS) -> Times:
    """Returns seconds per call: ``least`` to 101 rounds, for ``budget`` seconds, in rotating order."""
    repeats = {}
    for key, call in calls.items():
        call()
        repeats[key] = max(1, math.ceil(SHORTEST / _timed(call, 1)))
    times: Times = {key: [] for key in calls}
    order, begin = list(calls), time.perf_counter()
    for done in range(MAX_ROUNDS):
        if done >= least and time.perf_counter() - begin > budget:
            break
        order = order[1:] + order[:1]
        for key in order:
            times[key].append(_timed(calls[key], repeats[key]))
    return times


def ratio(times: Times, key: str, baseline: str) -> float:
    """Returns how many times faster ``key`` is than ``baseline``: the median over the rounds."""
    return statistics.median(slow / fast for slow, fast in zip(times[baseline], times[key], strict=True))


def _timed(call: Callable[[], object], repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats
