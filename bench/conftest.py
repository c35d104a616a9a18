from collections.abc import Collection, Mapping

import pytest
import torch

from .timing import MIN_ROUNDS, Calls, medians, ratio, time_in_turns

SECONDS = 0.4  # of timing a row in one process


@pytest.fixture(autouse=True)
def _quiet():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture
def record(benchmark):
    """Returns a function that times a call and its baselines, and puts the row into pytest-benchmark's JSON.

    ``best`` names the baselines of which the fastest is the best dense. ``shares`` names slow baselines that do only a
    share of the work, in fewer rounds; their times are divided by that share. ``pause`` is that of ``time_in_turns``.
    """

    def run(
        row: dict,
        call,
        baselines: Calls,
        *,
        bytes_moved: int = 0,
        copied: int = 0,
        best: Collection[str] = (),
        shares: Mapping[str, float] | None = None,
        pause: float = 0.0,
    ) -> None:
        least = 3 if shares is not None else MIN_ROUNDS
        times = time_in_turns({"own": call, **baselines}, SECONDS, least, pause)
        for key, share in (shares or {}).items():
            times[key] = [each / share for each in times[key]]
        seconds = medians(times)
        ratios = {key: ratio(times, "own", key) for key in baselines}
        if copied:  # compares bytes per second with those of the copy
            ratios["copy_"] *= bytes_moved / copied
        if best:
            ratios["best dense"] = ratios[min(best, key=lambda key: seconds[key])]
        benchmark.extra_info.update(row, seconds=seconds, ratios=ratios, bytes=bytes_moved)
        benchmark.pedantic(call, rounds=3)

    return run
