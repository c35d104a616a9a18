"""Times calls on a CPU or GPU, in turns, and compares them pair by pair."""

import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

MIN_ROUNDS, MAX_ROUNDS = 9, 101
RATIO, WINS = 1.05, 0.8  # a call with at least these is clearly faster than the plain layer
PARITY_RATIO = 0.97  # a call with at least this ratio is not slower
MAX_SPREAD = 0.5  # a quiet machine shows 0.02 to 0.2
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}  # times the largest output
SHORTEST = 200e-6  # seconds; shorter calls on a CPU are timed several at a time
MAX_EVICTION = 256 * 2**20  # bytes; bounds time and memory if a virtual machine reports the whole cache of its host
QUEUE_CYCLES = 2_000_000  # of a GPU, about a millisecond: longer than the host needs to queue the kernels of a layer

T = TypeVar("T")
Call = Callable[[Any], Any]


class Clock(Protocol):
    """A clock for single calls; ``start`` is given a typical call before the first measurement."""

    def start(self, call: Call, x: Any) -> None: ...

    def seconds(self, call: Call, x: Any) -> float: ...


def clock(device: torch.device, *, evict_cache: bool, graphs: bool = False) -> Clock:
    """Returns the clock of a device.

    Args:
        device: the device on which the calls compute.
        evict_cache: whether to evict the weights from the last-level cache before every call, as the other layers of a
            large model do. This reads a buffer of twice the size of the cache, and so takes bounded memory for a weight
            of any size; taking turns over copies of a small weight would need dozens of them.
        graphs: whether the calls will be replayed from CUDA graphs, so that the time of the host does not count.
    """
    return GpuClock(device, evict_cache, graphs) if device.type == "cuda" else CpuClock(evict_cache)


class CpuClock:
    """A clock of wall time on a CPU."""

    def __init__(self, evict_cache: bool):
        self.evict_cache = evict_cache
        size = min(2 * last_level_cache(), MAX_EVICTION) if evict_cache else 0
        self.evicted = torch.ones(size // 4, dtype=torch.float32, device="cpu")
        self.calls = 1

    def start(self, call: Call, x: Tensor) -> None:
        begin = time.perf_counter()
        call(x)
        self.calls = 1 if self.evict_cache else math.ceil(SHORTEST / max(time.perf_counter() - begin, 1e-9))

    def seconds(self, call: Call, x: Tensor) -> float:
        if self.evict_cache:
            self.evicted.sum()
            x.sum()  # in a model the input has just been computed
        else:
            call(x)  # the other calls of this round have evicted this weight from the cache
        begin = time.perf_counter()
        for _ in range(self.calls):
            call(x)
        return (time.perf_counter() - begin) / self.calls


class GpuClock:
    """A clock on a GPU. It takes the longer of device and host time, because an eager model waits for both."""

    def __init__(self, device: torch.device, evict_cache: bool, graphs: bool):
        self.evict_cache, self.graphs = evict_cache, graphs
        size = 2 * cache_bytes(device) if evict_cache else 0
        self.evicted = torch.empty(size, dtype=torch.uint8, device=device)
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def start(self, call: Call, x: Tensor) -> None:
        for _ in range(3):  # allocates workspaces, and compiles kernels
            call(x)

    def seconds(self, call: Call, x: Tensor) -> float:
        with torch.cuda.device(x.device):
            self.evicted.zero_()
            x.sum()  # in a model the input has just been computed
            torch.cuda._sleep(QUEUE_CYCLES)  # otherwise the device might wait for the host between the events
            self.begin.record()
            begin = time.perf_counter()
            call(x)
            host = time.perf_counter() - begin
            self.end.record()
            self.end.synchronize()
            device = self.begin.elapsed_time(self.end) / 1e3
        return device if self.graphs else max(device, host)


class PassClock:
    """A clock of passes of a model; a call gets ready first, such as by copying its batch, and returns what is timed.

    Args:
        gpus: those that are waited for.
    """

    def __init__(self, gpus: Iterable[torch.device]):
        self.gpus = tuple(gpus)

    def start(self, call: Call, x: Any) -> None:
        self.seconds(call, x)

    def seconds(self, call: Call, x: Any) -> float:
        run = call(x)
        self._wait()
        begin = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - begin

    def _wait(self) -> None:
        for gpu in self.gpus:
            torch.cuda.synchronize(gpu)


def is_gpu(device: torch.device) -> bool:
    """Returns whether layers on a device are measured and routed as on a GPU."""
    return device.type == "cuda"


@cache
def cache_bytes(device: torch.device) -> int:
    """Returns the bytes of the last cache before the memory of a device."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else last_level_cache()


@cache
def last_level_cache() -> int:
    """Returns the bytes of the largest cache of the first CPU; 32 MiB if the system does not say."""
    sizes = [32 * 2**20]
    folders = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    try:
        sizes = [int(path.read_text().strip().rstrip("K")) * 1024 for path in folders] or sizes
    except (OSError, ValueError):
        return sizes[0]
    return max(sizes)


@dataclass(frozen=True)
class Timing:
    """The times of one call compared with the plain layer's, measured in turns.

    Args:
        seconds: median time of a call.
        ratio: median of the plain layer's time over this one's, pair by pair; above 1 is faster.
        wins: the share of pairs in which this one was faster.
        best_dense: the same ratio against the dense module with the lowest median.
        spread: the interquartile range of the ratios divided by their median; for the plain layer that of its own
            seconds, which shows how much the machine was disturbed. If two measurements disagree by more, their
            difference.
    """

    seconds: float
    ratio: float
    wins: float
    best_dense: float
    spread: float

    @property
    def faster(self) -> bool:
        """Whether it is clearly faster than the plain layer."""
        return self.ratio >= RATIO and self.wins >= WINS

    @property
    def undecided(self) -> bool:
        """Whether it might be faster, but the machine was too busy to tell."""
        return not self.faster and self.spread > MAX_SPREAD and self.ratio * (1 + self.spread) >= RATIO


Timings = dict[str, Timing | None]


def pessimistic(first: Timings, second: Timings) -> Timings:
    """Returns, for each call, the less favorable of two measurements.

    Its seconds are the mean of both; if they disagree by more than either spread, the difference becomes the spread.
    """

    def of(one: Timing | None, other: Timing | None) -> Timing | None:
        if one is None or other is None:
            return None
        least = min(one, other, key=lambda timing: (timing.faster, timing.ratio))
        low, high = sorted((one.ratio, other.ratio))
        spread = max(one.spread, other.spread, high / low - 1)
        return replace(least, seconds=(one.seconds + other.seconds) / 2, spread=spread)

    return {name: of(timing, second[name]) for name, timing in first.items()}


def paired_timing(own: list[float], plain: list[float], best: list[float]) -> Timing:
    """Returns the timing of one call, given the seconds per round of it, the plain call and the best dense call."""
    ratios = [other / mine for other, mine in zip(plain, own, strict=True)]
    return Timing(
        seconds=statistics.median(own),
        ratio=statistics.median(ratios),
        wins=statistics.fmean(mine < other for other, mine in zip(plain, own, strict=True)),
        best_dense=statistics.median(other / mine for other, mine in zip(best, own, strict=True)),
        spread=spread(own if own is plain else ratios),
    )


def spread(values: Sequence[float]) -> float:
    """Returns the interquartile range of times or ratios divided by their median."""
    low, median, high = statistics.quantiles(values, n=4)
    return (high - low) / median


def take_turns(calls: Mapping[str, Callable[[], T]], budget: float, least: int, most: int) -> dict[str, list[T]]:
    """Makes every call once per round, in an order drawn anew, so that a disturbance affects all calls alike.

    What a call finds in the caches depends on the call before it: in a fixed order, a model whose weights come from
    memory took 8 % longer after one with larger weights than its equal did after a small one.

    Rounds go on for ``budget`` seconds, with at least ``least`` and at most ``most``.

    Returns:
        The results of each call, round by round.
    """
    results: dict[str, list[T]] = {name: [] for name in calls}
    names, begin, order = list(calls), time.perf_counter(), random.Random(0)
    for done in range(most):
        if done >= least and time.perf_counter() - begin > budget:
            break
        order.shuffle(names)
        for name in names:
            results[name].append(calls[name]())
    return results


def time_interleaved(
    calls: Mapping[str, Call], x: Any, clock: Clock, budget: float, least: int = MIN_ROUNDS
) -> dict[str, list[float]]:
    """Returns the seconds of every call, round by round, as ``take_turns`` makes them; one call is named ``"plain"``.

    Rounds go on for ``budget`` seconds, with at least ``least`` and at most 101.
    """
    begin = time.perf_counter()
    clock.start(calls["plain"], x)
    timed = {name: partial(clock.seconds, call, x) for name, call in calls.items()}
    return take_turns(timed, budget - (time.perf_counter() - begin), least, MAX_ROUNDS)
