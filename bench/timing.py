"""Times calls in turns, so that a disturbance affects all alike."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

from sparsekit._timing import SHORTEST
from sparsekit._timing import spread as spread
from sparsekit._timing import take_turns as take_turns

MIN_ROUNDS, MAX_ROUNDS = 5, 101

Calls = dict[str, Callable[[], object]]
Times = dict[str, list[float]]


def time_in_turns(calls: Calls, budget: float = 1.0, least: int = MIN_ROUNDS, pause: float = 0.0) -> Times:
    """Returns the seconds of each call, from ``least`` to 101 rounds within ``budget`` seconds, as ``take_turns``.

    Before each turn comes a ``pause`` in seconds, after which no thread of another library spins any more, and one call
    that is not timed.
    """
    timed = {}
    for key, call in calls.items():
        call()
        timed[key] = partial(_seconds, call, max(1, math.ceil(SHORTEST / _seconds(call, 1))), pause)
    return take_turns(timed, budget, least, MAX_ROUNDS)


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    return {key: statistics.median(each) for key, each in times.items()}


def ratio(times: Mapping[str, list[float]], key: str, baseline: str) -> float:
    """Returns how many times faster ``key`` is than ``baseline``: the median over the rounds."""
    return statistics.median(slow / fast for slow, fast in zip(times[baseline], times[key], strict=True))


def _seconds(call: Callable[[], object], repeats: int, pause: float = 0.0) -> float:
    if pause:
        time.sleep(pause)
        call()
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats
