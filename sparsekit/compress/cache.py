"""Remembers measurements, each in one small file."""

import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .. import _timing
from .._json import write_json
from .._timing import MAX_SPREAD, Timing, Timings
from ..ops import simd_level

CPU = torch.device("cpu")
PACKAGE = Path(__file__).parents[1]


def remembered(key: Mapping[str, Any], compute: Callable[[], Timings], device: torch.device = CPU) -> Timings:
    """Returns the timings of ``key`` on a device of this machine: from the tune cache, or else computed and put there.

    The cache holds one small JSON file per key in ``$XDG_CACHE_HOME/sparsekit/tune`` (``~/.cache`` by default), written
    whole or not at all, so that any number of processes may share it. A file that is damaged, or that another program
    wrote, is written anew. What was measured on a busy machine, with a spread above one half, is used once and not
    kept. ``SPARSEKIT_TUNE_CACHE=0`` switches the cache off, a path moves it; delete the folder to measure again.
    """
    if (folder := cache_folder()) is None:
        return compute()
    full = _full(key, device)
    path = _path(folder, full)
    if (known := _read(path, full)) is not None:
        return known
    timings = compute()
    if is_steady(timings):
        _write(path, full, timings)
    return timings


def forget(key: Mapping[str, Any], device: torch.device = CPU) -> None:
    """Removes the timings of ``key`` from the tune cache, so that they are measured again."""
    if (folder := cache_folder()) is not None:
        with suppress(OSError):
            _path(folder, _full(key, device)).unlink()


def is_steady(timings: Timings) -> bool:
    """Returns whether the machine was quiet enough for timings to be relied on next time."""
    return all(timing is None or timing.spread <= MAX_SPREAD for timing in timings.values())


def _full(key: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return json.loads(json.dumps({**machine(device), **key}))  # as it will be read: tuples are lists


def _path(folder: Path, full: dict[str, Any]) -> Path:
    return folder / f"{_hash(full)[:32]}.json"


def cache_folder() -> Path | None:
    """Returns the folder of the tune cache, or None where it is switched off or the user has no home."""
    chosen = os.environ.get("SPARSEKIT_TUNE_CACHE", "")
    if chosen == "0":
        return None
    if chosen:
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsekit" / "tune"
    except RuntimeError:  # nobody says where this user is at home
        return None


def _hash(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _read(path: Path, key: dict[str, Any]) -> Timings | None:
    """Returns the timings of a file that ``_write`` wrote for this key, or None if it is any other file."""
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        if entry["key"] != key or entry["digest"] != _hash(entry["timings"]):
            return None
        return {name: None if timing is None else Timing(**timing) for name, timing in entry["timings"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _write(path: Path, key: dict[str, Any], timings: Timings) -> None:
    data = {name: timing and asdict(timing) for name, timing in timings.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"key": key, "timings": data, "digest": _hash(data)})
    except OSError:  # a cache that cannot be written costs time, not correctness
        return


def machine(device: torch.device) -> dict[str, Any]:
    """Returns what a timing depends on besides the layer: the hardware, and the versions of all that computes on it."""
    common = {
        "torch": torch.__version__,
        "sparsekit": _digest(PACKAGE, ("nn/*.py", "ops/*.py")),
        "matmul": [torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()],
    }
    if _timing.is_gpu(device):
        return {**common, **_gpu(device)}
    return {
        **common,
        "device": _cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "simd": simd_level(),
        "onednn": [torch.backends.mkldnn.enabled, os.environ.get("ONEDNN_MAX_CPU_ISA")],
        "extension": _digest(PACKAGE, ("_C.*",)),
    }


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    kernels = find_spec("sparsekit.triton_kernels")
    return {
        "device": properties.name,
        "capability": [properties.major, properties.minor],
        "processors": properties.multi_processor_count,
        "cuda": torch.version.cuda or torch.version.hip,
        "cusparselt": torch.backends.cusparselt.version(),
        "triton": _version("triton"),
        "kernels": _digest(Path(kernels.origin).parent, ("*.*",)) if kernels and kernels.origin else "",
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


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
def _digest(folder: Path, patterns: tuple[str, ...]) -> str:
    """Returns a digest of the files that compute.

    A version number says nothing about a working copy, and one that is not installed has none.
    """
    files = sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
    sha = hashlib.sha256()
    for path in files:
        sha.update(path.read_bytes())
    return sha.hexdigest()[:16] if files else ""
