"""Times calls on a GPU, in turns, with CUDA events."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch

from bench.timing import take_turns

MIN_ROUNDS, MAX_ROUNDS = 7, 51
SPINS_PER_SECOND = 2.1e9  # a little above the clock of any GPU, so that the wait is never too short
MAX_SPIN = 0.05  # seconds

Call = Callable[[], object]
Contenders = Mapping[str, Sequence[Call]]  # several calls that differ in their buffers only


class Times(NamedTuple):
    """The seconds per call of every contender, round by round."""

    device: dict[str, list[float]]
    host: dict[str, list[float]]  # until the call returned; calls that were replayed as a graph have none

    def eager(self) -> dict[str, list[float]]:
        """Returns the longer of device and host time, which is what a caller without CUDA graphs waits for."""
        return {key: list(map(max, each, self.host[key])) for key, each in self.device.items()}


class KernelClock:
    """A clock of calls on a GPU.

    The GPU waits until the host has queued all launches, so that the time between two events is that of the kernels
    and not that of the host.
    """

    def __init__(self, device: torch.device):
        self.cache = torch.cuda.get_device_properties(device).L2_cache_size  # bytes

    def time_in_turns(
        self, contenders: Contenders, budget: float = 0.25, *, capture: bool = False, least: int = MIN_ROUNDS
    ) -> Times:
        """Times every contender in an order drawn anew, after a warm-up.

        There are at least ``least`` rounds, and more until ``budget`` seconds are over. With ``capture``, calls that
        can be captured are replayed as one CUDA graph, without the gaps that the host leaves between them.
        """
        graphs = {key: self.graph(calls) if capture else None for key, calls in contenders.items()}
        runs = {key: graphs[key] or partial(_call_all, calls) for key, calls in contenders.items()}
        once = {key: partial(self.once, run, self.warm_up(run), len(contenders[key])) for key, run in runs.items()}
        rounds = take_turns(once, budget, least, MAX_ROUNDS)
        device = {key: [seconds for seconds, _ in each] for key, each in rounds.items()}
        return Times(device, {key: [host for _, host in each] for key, each in rounds.items() if not graphs[key]})

    def seconds(self, calls: Sequence[Call]) -> float:
        """Returns the median seconds of one call, from three rounds."""
        return statistics.median(self.time_in_turns({"": calls}, 0, least=3).device[""])

    def graph(self, calls: Sequence[Call]) -> Call | None:
        """Captures the calls as one graph and returns a function that replays it; None if they cannot be captured."""
        _call_all(calls)  # compiles, and sets up libraries, which a capture does not allow
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                results = _call_all(calls)
        except Exception:  # not every baseline can be captured
            torch.cuda.synchronize()
            return None
        return lambda: graph.replay() or results  # keeps the results, to which the graph writes

    def warm_up(self, run: Call) -> float:
        """Runs twice, and returns the seconds that the host took the second time."""
        for _ in range(2):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            run()
            took = time.perf_counter() - begin
        torch.cuda.synchronize()
        return took

    def once(self, run: Call, host_seconds: float, calls: int) -> tuple[float, float]:
        """Returns the seconds of one of ``calls`` on the device and on the host, which takes about ``host_seconds``."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(min(1.5 * host_seconds + 50e-6, MAX_SPIN) * SPINS_PER_SECOND))
        start.record()
        begin = time.perf_counter()
        run()
        took = time.perf_counter() - begin
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / calls, took / calls


def _call_all(calls: Sequence[Call]) -> list[object]:
    """Makes all calls and keeps all results, so that each call writes to memory of its own."""
    return [call() for call in calls]
