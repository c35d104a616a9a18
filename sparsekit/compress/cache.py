"""Remembers measurements: one small file per question and machine."""

import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .._files import write_json
from ..ops import simd_level
from . import clock
from .tune import Timing, Timings

MAX_SPREAD = 0.5  # a quiet machine shows 0.02 to 0.2
CPU = torch.device("cpu")


def remembered(key: Mapping[str, Any], compute: Callable[[], Timings], device: torch.device = CPU) -> Timings:
    """The timings of ``key`` on a device of this machine: from the tune cache, or else computed and put there.

    The cache holds one small JSON file per key in ``$XDG_CACHE_HOME/sparsekit/tune`` (``~/.cache`` by default), written
    whole or not at all, so that any number of processes may share it. A file that cannot be read is written anew.
    What was measured on a busy machine, with a spread above one half, is used once and not kept.
    ``SPARSEKIT_TUNE_CACHE=0`` switches the cache off, a path moves it; delete the folder to measure again.
    """
    folder = _cache_folder()
    if folder is None:
        return compute()
    text = json.dumps({**machine(device), **key}, sort_keys=True)
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


def machine(device: torch.device) -> dict[str, Any]:
    """What a timing depends on besides the layer: the hardware and the versions of all that computes on it."""
    common = {"torch": torch.__version__, "sparsekit": version("sparsekit")}
    if clock.is_gpu(device):
        return {**common, **_gpu(device)}
    return {
        **common,
        "device": _cpu_name(),
        "threads": torch.get_num_threads(),
        "simd": simd_level(),
        "extension": _digest(Path(__file__).parents[1], "_C.*"),
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
        "kernels": _digest(Path(kernels.origin).parent, "*.*") if kernels and kernels.origin else "",
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
def _digest(folder: Path, pattern: str) -> str:
    """Of the files that compute: a version number says nothing about a working copy."""
    files = sorted(path for path in folder.glob(pattern) if path.is_file())
    sha = hashlib.sha256()
    for path in files:
        sha.update(path.read_bytes())
    return sha.hexdigest()[:16] if files else ""
