"""Prints the versions, the kernels of each op by device, and what is missing."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ._version import DISTRIBUTION, VERSION
from .compress.cache import cache_folder
from .ops import backends, simd_level, simd_levels
from .ops._kernels import missing_kernels

PACKAGES = ("safetensors", "triton", "transformers", "accelerate", "peft", "diffusers", "tyro", "rich")


def show_config() -> None:
    """Prints versions, which kernel runs each op on each device, and what is missing, with commands that install it.

    Add its output to a bug report.
    """
    sys.stdout.write("\n".join([*_versions(), *_devices(), *_missing(), *_ops()]) + "\n")


def _versions() -> list[str]:
    found = {name: _version(name) for name in PACKAGES}
    return [
        f"sparsekit {VERSION} in {Path(__file__).parent}",
        f"Python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}",
        "packages: " + ", ".join(f"{name} {there}" for name, there in found.items() if there),
        f"tune cache: {cache_folder() or 'switched off'}",
    ]


def _devices() -> list[str]:
    levels = f", one of {', '.join(simd_levels())}" if simd_levels() else ""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return [
        f"CPU kernels: {simd_level()}{levels}; {torch.get_num_threads()} threads",
        f"GPUs: {', '.join(gpus) or 'none that this torch can use'}",
    ]


def _missing() -> list[str]:
    missing = []
    if why := missing_kernels():
        missing.append(f"missing: compiled CPU kernels: {why}")
    if _version("triton") is None:
        missing.append("missing: triton, without which no kernel of this package runs on a GPU: pip install triton")
    if None in map(_version, ("tyro", "rich", "transformers", "pillow")):
        missing.append(f"missing: the command line's packages: pip install '{DISTRIBUTION}[cli]'")
    return missing


def _ops() -> list[str]:
    answers = backends()
    width = max(map(len, answers))
    return [f"{'op':{width}}  {'CPU':12}  GPU"] + [
        f"{op:{width}}  {answer['cpu']:12}  {answer['cuda']}" for op, answer in answers.items()
    ]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
