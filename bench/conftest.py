from collections.abc import Collection, Mapping

import pytest
import torch

from .timing import MIN_ROUNDS, Calls, medians, ratio, time_interleaved


@pytest.fixture(autouse=True)
def _quiet():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture
def record(benchmark):
    """Times a call and its baselines, and keeps the row for the report, through pytest-benchmark's JSON.

    ``best``: the baselines of which the fastest is the best dense. ``shares``: of slow baselines, which take part in
    fewer rounds, how much of the work they do; scaled to all of it.
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
    ) -> None:
        times = time_interleaved({"own": call, **baselines}, least=3 if shares is not None else MIN_ROUNDS)
        for key, share in (shares or {}).items():
            times[key] = [each / share for each in times[key]]
        seconds = medians(times)
        ratios = {key: ratio(times, "own", key) for key in baselines}
        if copied:  # bytes per second against the copy's
            ratios["copy_"] *= bytes_moved / copied
        if best:
            ratios["best dense"] = ratios[min(best, key=lambda key: seconds[key])]
        benchmark.extra_info.update(row, seconds=seconds, ratios=ratios, bytes=bytes_moved)
        benchmark.pedantic(call, rounds=3)

    return run
