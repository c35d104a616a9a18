"""Clocks: how long a call takes, on a CPU or on a GPU."""

import math
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

SHORTEST = 200e-6  # seconds; a shorter call on a CPU is timed several at a time
MAX_EVICTION = 256 * 2**20  # bytes; bounds time and memory where a virtual machine reports the host's whole cache
AHEAD = 2_000_000  # GPU cycles, about a millisecond: longer than a host needs to queue a layer's kernels

Call = Callable[[Any], Any]


class Clock(Protocol):
    """Times single calls; ``start`` is told of a typical one first."""

    def start(self, call: Call, x: Any) -> None: ...

    def seconds(self, call: Call, x: Any) -> float: ...


def clock(device: torch.device, *, evict_cache: bool, graphs: bool = False) -> Clock:
    """The clock of a device.

    Args:
        device: where the calls compute.
        evict_cache: whether the last-level cache is emptied of weights before every call, as the other layers of a
            model that is larger than that cache would do. Reading a buffer of twice its size does that for a weight of
            any size and in bounded memory, where rotating over copies of the weight would need dozens.
        graphs: whether the calls will be replayed from CUDA graphs, so that what the host does costs nothing.
    """
    return GpuClock(device, evict_cache, graphs) if device.type == "cuda" else CpuClock(evict_cache)


class CpuClock:
    """Wall time."""

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
            x.sum()  # an input has just been computed
        else:
            call(x)  # the forms that took their turns before have put this one's weight out of the cache
        begin = time.perf_counter()
        for _ in range(self.calls):
            call(x)
        return (time.perf_counter() - begin) / self.calls


class GpuClock:
    """The longer of the device's time and the host's: a model that runs eagerly waits for either."""

    def __init__(self, device: torch.device, evict_cache: bool, graphs: bool):
        self.evict_cache, self.graphs = evict_cache, graphs
        size = 2 * cache_bytes(device) if evict_cache else 0
        self.evicted = torch.empty(size, dtype=torch.uint8, device=device)
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def start(self, call: Call, x: Tensor) -> None:
        for _ in range(3):  # workspaces, and kernels that are compiled at their first call
            call(x)

    def seconds(self, call: Call, x: Tensor) -> float:
        with torch.cuda.device(x.device):
            self.evicted.zero_()
            x.sum()  # an input has just been computed
            torch.cuda._sleep(AHEAD)  # the events would show the host's time if the device had to wait for it
            self.begin.record()
            begin = time.perf_counter()
            call(x)
            host = time.perf_counter() - begin
            self.end.record()
            self.end.synchronize()
            device = self.begin.elapsed_time(self.end) / 1e3
        return device if self.graphs else max(device, host)


def is_gpu(device: torch.device) -> bool:
    """Whether layers on a device are measured and routed as on a GPU."""
    return device.type == "cuda"


@cache
def cache_bytes(device: torch.device) -> int:
    """Bytes of the last cache before the memory of a device."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else last_level_cache()


@cache
def last_level_cache() -> int:
    """Bytes of the largest cache of this machine's first CPU; 32 MiB where the system does not say."""
    sizes = [32 * 2**20]
    folders = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    try:
        sizes = [int(path.read_text().strip().rstrip("K")) * 1024 for path in folders] or sizes
    except (OSError, ValueError):
        return sizes[0]
    return max(sizes)
