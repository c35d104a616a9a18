"""Times calls in turns: on a GPU by events, with the launches queued up ahead of them."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

MIN_ROUNDS, MAX_ROUNDS = 7, 51
SPINS_PER_SECOND = 2.1e9  # a little above the clock of any GPU, so that the wait is never too short
MAX_SPIN = 0.05  # seconds
MAX_SETS = 64

Call = Callable[[], object]
Contenders = Mapping[str, Sequence[Call]]  # several calls that differ in their buffers only


@dataclass(frozen=True)
class Race:
    """Seconds per call of every contender, round by round.

    Args:
        times: on the device.
        host: until the call returned; empty where the calls were replayed as a graph.
    """

    times: dict[str, list[float]]
    host: dict[str, list[float]]

    def seconds(self) -> dict[str, float]:
        return {key: statistics.median(each) for key, each in self.times.items()}

    def host_seconds(self) -> dict[str, float]:
        return {key: statistics.median(each) for key, each in self.host.items()}

    def calls(self) -> "Race":
        """What a caller waits for who sends call after call: the device or the host, whichever takes longer."""
        pairs = {key: zip(each, self.host[key], strict=True) for key, each in self.times.items()}
        return Race({key: [max(pair) for pair in each] for key, each in pairs.items()}, self.host)

    def spread(self, key: str) -> float:
        """The interquartile range of a contender's times over their median."""
        low, median, high = statistics.quantiles(self.times[key], n=4)
        return (high - low) / median

    def ratios(self, key: str) -> dict[str, float]:
        """How many times faster ``key`` is than each of the others: the median over the rounds."""
        own = self.times[key]
        return {
            other: statistics.median(slow / fast for slow, fast in zip(each, own, strict=True))
            for other, each in self.times.items()
            if other != key
        }


class HostClock:
    """Times calls that have ended when they return: rehearsals on a CPU."""

    cache = 0  # bytes of the last-level cache that buffers must exceed
    rounds = 2, 2

    def sets(self, nbytes: int) -> int:
        """How many buffers of ``nbytes`` are three times the cache: a round over them finds none there."""
        return max(1, min(MAX_SETS, -(-3 * self.cache // max(nbytes, 1))))

    def race(self, contenders: Contenders, budget: float = 0.25, *, capture: bool = False) -> Race:
        """Times every contender for ``budget`` seconds, at least 7 rounds in rotating order.

        Args:
            contenders: the calls by name; each is called before anything is timed.
            budget: seconds for all together.
            capture: whether the calls are replayed as one graph where they can be captured, which leaves out the gaps
                that a host needs to launch.
        """
        runs = {key: self._prepare(calls, capture) for key, calls in contenders.items()}
        times: dict[str, list[float]] = {key: [] for key in runs}
        host: dict[str, list[float]] = {key: [] for key, (_, replayed) in runs.items() if not replayed}
        spin = {key: self._warm_up(run) for key, (run, _) in runs.items()}
        order, begin = list(runs), time.perf_counter()
        least, most = self.rounds
        for done in range(most):
            if done >= least and time.perf_counter() - begin > budget:
                break
            order = order[1:] + order[:1]
            for key in order:
                count = len(contenders[key])
                on_device, on_host = self._time(runs[key][0], spin[key])
                times[key].append(on_device / count)
                if key in host:
                    host[key].append(on_host / count)
        return Race(times, host)

    def seconds(self, calls: Sequence[Call], rounds: int = 3) -> float:
        """The median seconds of one call, quickly."""
        run, _ = self._prepare(calls, False)
        spin = self._warm_up(run)
        return statistics.median(self._time(run, spin)[0] for _ in range(rounds)) / len(calls)

    def synchronize(self) -> None:
        return

    def _prepare(self, calls: Sequence[Call], capture: bool) -> tuple[Call, bool]:
        """Runs all calls, keeping their results to the end so that each writes to memory of its own."""
        return lambda: [call() for call in calls], False

    def _warm_up(self, run: Call) -> float:
        """The seconds that the host needs for a run, of which the first one costs more."""
        run()
        return 0.0

    def _time(self, run: Call, host_seconds: float) -> tuple[float, float]:
        begin = time.perf_counter()
        run()
        took = time.perf_counter() - begin
        return took, took


class DeviceClock(HostClock):
    """Times kernels between two events. A GPU that spins meanwhile lets the host queue the launches up, so that what
    is timed is the kernels one after the other, not the host."""

    rounds = MIN_ROUNDS, MAX_ROUNDS

    def __init__(self, device: torch.device):
        self.device = device
        self.cache = torch.cuda.get_device_properties(device).L2_cache_size

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def _prepare(self, calls: Sequence[Call], capture: bool) -> tuple[Call, bool]:
        run, _ = super()._prepare(calls, False)
        if not capture:
            return run, False
        run()  # compiles, and sets up libraries, which a capture does not allow
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                kept = run()
        except Exception:  # not every baseline can be captured
            self.synchronize()
            return run, False

        def replay(kept: object = kept) -> None:
            graph.replay()

        return replay, True

    def _warm_up(self, run: Call) -> float:
        super()._warm_up(run)
        self.synchronize()
        begin = time.perf_counter()
        run()
        took = time.perf_counter() - begin
        self.synchronize()
        return took

    def _time(self, run: Call, host_seconds: float) -> tuple[float, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        spin = min(1.5 * host_seconds + 50e-6, MAX_SPIN)
        torch.cuda._sleep(int(spin * SPINS_PER_SECOND))
        start.record()
        begin = time.perf_counter()
        run()
        took = time.perf_counter() - begin
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3, took
