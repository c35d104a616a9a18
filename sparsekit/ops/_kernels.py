"""The only place that joins ops to device kernels."""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .. import _native
from .._native import SlowKernelsWarning as SlowKernelsWarning
from ._define import LIBRARY, reference_of, without_autocast

NATIVE = _native.load()
# The file of triton_kernels whose launcher, named as the op, answers it on GPUs.
TRITON: dict[str, str] = {
    "nm_mask": "nm",
    "nm_mask_bits": "nm",
    "nm_prune": "nm",
    "nm_prune_": "nm",
    "transposable_mask": "transposable",
    "block_scores": "blocks",
    "block_topk_mask": "blocks",
    "tier_prune": "tiers",
    "tier_scores": "tier_scores",
    "pack24": "sparse24",
    "unpack24": "sparse24",
    "prune_pack24": "sparse24",
    "linear24": "linear24",
    "linear_tiered": "tiered",
    "sparsegpt_block": "sparsegpt",
    "to_hardware24": "hardware24",
    "from_hardware24": "hardware24",
    "prune_to_hardware24": "hardware24",
    "prune_both_to_hardware24": "hardware24_both",
}
# Answered on GPUs by the function of the same name in ops/_vendor.py: libraries that come with PyTorch.
VENDOR = ("hardware_linear24",)
OPS = (
    "nm_mask",
    "nm_mask_bits",
    "nm_prune",
    "nm_prune_",
    "transposable_mask",
    "block_scores",
    "block_topk_mask",
    "tier_prune",
    "tier_scores",
    "pack24",
    "prune_pack24",
    "unpack24",
    "linear24",
    "linear_tiered",
    "sparsegpt_block",
)


def register_slow() -> None:
    """Lets the references answer on the CPU where the extension is missing; the first call says why, with a warning."""
    if NATIVE not in ("loaded", _native.SWITCHED_OFF):
        for op in OPS:
            LIBRARY.impl(op, _slow(reference_of(getattr(torch.ops.sparsekit, op).default)), "CPU")


def _slow(reference: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        warn_slow()
        return reference(*args)

    return run


@cache
def warn_slow() -> None:
    """Warns, once per process, that the compiled extension is missing: in the line that called this package."""
    warnings.warn(
        f"sparsekit computes in plain PyTorch, many times slower: the compiled extension is {missing_kernels()}, "
        "or set SPARSEKIT_NATIVE=0 to do without it",
        SlowKernelsWarning,
        stacklevel=_depth_of_caller(),
    )


def missing_kernels() -> str:
    """Why the compiled kernels do not answer on the CPU, and what brings them; empty where they do."""
    if NATIVE == "loaded":
        return ""
    if NATIVE == _native.SWITCHED_OFF:
        return f"{NATIVE}: unset it"
    why, command = _native.remedy(_native.PACKAGE)
    return f"{NATIVE}, {why}: get it with `{command}`"


def _depth_of_caller() -> int:
    """The stack level of the first caller that is neither this package nor PyTorch."""
    inside = (str(_native.PACKAGE), str(Path(torch.__file__).parent))
    frame, depth = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        frame, depth = frame.f_back, depth + 1
    return depth


def register_vendor() -> None:
    """Lets the libraries that PyTorch ships answer on GPUs."""
    vendor = import_module("sparsekit.ops._vendor")
    for op in VENDOR:
        LIBRARY.impl(op, without_autocast(getattr(vendor, op)), "CUDA")


def register_triton() -> None:
    """Lets the Triton kernels answer on GPUs, where Triton is installed; a file is imported when its op is called."""
    if find_spec("triton") is None:
        return
    for op, family in TRITON.items():
        LIBRARY.impl(op, _launcher(family, op), "CUDA")


def _launcher(family: str, op: str) -> Callable[..., Any]:
    @cache
    def find() -> Callable[..., Any]:
        launcher: Callable[..., Any] = getattr(import_module(f"sparsekit.triton_kernels.{family}"), op)
        return launcher

    return without_autocast(lambda *args: find()(*args))


def backends() -> dict[str, dict[str, str]]:
    """Says which kernel answers each op on each device: ``{"nm_mask": {"cpu": "avx2", "cuda": "reference"}, ...}``.

    On the CPU a compiled kernel is named by its SIMD level; ``"reference"`` is plain PyTorch.
    """
    return {op: {"cpu": _answers(op, "CPU"), "cuda": _answers(op, "CUDA")} for op in OPS}


def _answers(op: str, key: str) -> str:
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"sparsekit::{op}", key):
        return "reference"
    return simd_level() if key == "CPU" else "triton"


def simd_levels() -> tuple[str, ...]:
    """The SIMD levels that this machine can run, the best last; empty without the compiled extension."""
    return tuple(torch.ops.sparsekit._simd_levels().split()) if NATIVE == "loaded" else ()


def simd_level() -> str:
    """The SIMD level that the compiled CPU kernels run at; ``"reference"`` without the compiled extension."""
    return torch.ops.sparsekit._simd_level("") if NATIVE == "loaded" else "reference"


@contextmanager
def force_simd(level: str) -> Iterator[None]:
    """Runs the CPU kernels of this process at one SIMD level, for tests and measurements.

    Raises:
        ValueError: ``level`` is not one of ``simd_levels()``.
    """
    if level not in simd_levels():
        raise ValueError(f"level must be one of {simd_levels()}, got {level!r}")
    before = simd_level()
    torch.ops.sparsekit._simd_level(level)
    try:
        yield
    finally:
        torch.ops.sparsekit._simd_level(before)
