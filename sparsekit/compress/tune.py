"""Times what a layer could become, on this machine, and remembers the answers."""

import copy
import hashlib
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._files import write_json
from ..ops import simd_level

MIN_ROUNDS, MAX_ROUNDS = 9, 101
MAX_SPREAD = 0.5  # a quiet machine shows 0.02 to 0.2
SHORTEST = 200e-6  # seconds; a shorter call is timed several at a time
MAX_EVICTION = 256 * 2**20  # bytes; bounds time and memory where a virtual machine reports the host's whole cache
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}  # of the largest output


@dataclass(frozen=True)
class Timing:
    """One module against the plain layer, in calls that took turns.

    Args:
        seconds: median time of a call.
        ratio: median of the plain layer's time over this one's, pair by pair; above 1 is faster.
        wins: the share of the pairs in which this one was faster.
        best_dense: the same ratio against the dense module with the lowest median.
        spread: the interquartile range of the ratios over their median.
    """

    seconds: float
    ratio: float
    wins: float
    best_dense: float
    spread: float


Timings = dict[str, Timing | None]


def measure(
    modules: Mapping[str, nn.Module], x: Tensor, *, dense: tuple[str, ...], cold: bool, budget: float
) -> Timings:
    """Times modules that compute the same on one input; the one called ``"plain"`` is the baseline and the reference.

    Rounds go on for ``budget`` seconds, with at least 9 and at most 101; the order changes from round to round.

    Args:
        modules: the modules by name.
        x: the input.
        dense: the names among which the best dense is chosen.
        cold: whether the last-level cache is emptied of weights before every call, as the other layers of a model that
            is larger than that cache would. Reading a buffer of twice its size does that at any size of weight and
            with a bounded memory, where rotating over copies of the weight would need dozens.
        budget: seconds.

    Returns:
        One ``Timing`` per name; None for a module that is wrong, which is not timed.
    """
    with torch.no_grad():
        expected = copy.deepcopy(modules["plain"]).double()(_checked(x).double())
        right = {name: module for name, module in modules.items() if _is_right(module, x, expected)}
        times = _race(right, x, cold, budget)
    best = min((name for name in dense if name in times), key=lambda name: statistics.median(times[name]))
    return {name: _timing(times[name], times["plain"], times[best]) if name in times else None for name in modules}


def _timing(own: list[float], plain: list[float], best: list[float]) -> Timing:
    ratios = [other / mine for other, mine in zip(plain, own, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    return Timing(
        seconds=statistics.median(own),
        ratio=median,
        wins=statistics.fmean(mine < other for other, mine in zip(plain, own, strict=True)),
        best_dense=statistics.median(other / mine for other, mine in zip(best, own, strict=True)),
        spread=(high - low) / median,
    )


def _race(modules: Mapping[str, nn.Module], x: Tensor, cold: bool, budget: float) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in modules}
    evicted = torch.ones(min(2 * last_level_cache(), MAX_EVICTION) // 4 if cold else 0)
    begin = time.perf_counter()
    modules["plain"](x)
    calls = 1 if cold else math.ceil(SHORTEST / max(time.perf_counter() - begin, 1e-9))
    names = list(modules)
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.perf_counter() - begin > budget:
            break
        names = names[1:] + names[:1]
        for name in names:
            module = modules[name]
            if cold:
                evicted.sum()
                x.sum()  # an input has just been computed
            start = time.perf_counter()
            for _ in range(calls):
                module(x)
            times[name].append((time.perf_counter() - start) / calls)
    return times


def _checked(x: Tensor) -> Tensor:
    """The first, a middle and the last row: the whole product in float64 would take longer than the measurement."""
    return x[[0, len(x) // 2, len(x) - 1]]


def _is_right(module: nn.Module, x: Tensor, expected: Tensor) -> bool:
    difference = (_checked(module(x)).double() - expected).abs().amax()
    return bool(difference <= TOLERANCE[x.dtype] * expected.abs().amax())


def remembered(key: Mapping[str, Any], compute: Callable[[], Timings]) -> Timings:
    """The timings of ``key`` on this machine: from the tune cache, or else computed and put there.

    The cache holds one small JSON file per key in ``$XDG_CACHE_HOME/sparsekit/tune`` (``~/.cache`` by default), written
    whole or not at all, so that any number of processes may share it. A file that cannot be read is written anew.
    What was measured on a busy machine, with a spread above one half, is used once and not kept.
    ``SPARSEKIT_TUNE_CACHE=0`` switches the cache off, a path moves it; delete the folder to measure again.
    """
    folder = _cache_folder()
    if folder is None:
        return compute()
    text = json.dumps({**_machine(), **key}, sort_keys=True)
    full = json.loads(text)  # as it will be read: tuples are lists
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
    if (known := _read(path, full)) is not None:
        return known
    timings = compute()
    if all(timing is None or timing.spread <= MAX_SPREAD for timing in timings.values()):
        _write(path, {"key": full, "timings": {name: timing and asdict(timing) for name, timing in timings.items()}})
    return timings


def _cache_folder() -> Path | None:
    chosen = os.environ.get("SPARSEKIT_TUNE_CACHE", "")
    if chosen == "0":
        return None
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsekit" / "tune"


def _read(path: Path, key: dict[str, Any]) -> Timings | None:
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        if entry["key"] != key:
            return None
        return {name: None if timing is None else Timing(**timing) for name, timing in entry["timings"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _write(path: Path, entry: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, entry)
    except OSError:  # a cache that cannot be written costs time, not correctness
        return


def _machine() -> dict[str, Any]:
    return {
        "device": _cpu_name(),
        "threads": torch.get_num_threads(),
        "simd": simd_level(),
        "torch": torch.__version__,
        "sparsekit": version("sparsekit"),
        "extension": _extension_tag(),
    }


@cache
def _cpu_name() -> str:
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        info = ""
    names = [line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")]
    return (
        f"{names[0] if names else platform.processor()} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    )


@cache
def _extension_tag() -> str:
    built = sorted(Path(__file__).parents[1].glob("_C.*"))
    return hashlib.sha256(built[0].read_bytes()).hexdigest()[:16] if built else ""


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
