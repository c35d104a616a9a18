"""Registers the kernels of the ops. No other file knows both."""

import re
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
from torch import Tensor

from .. import _native
from .._native import SlowKernelsWarning as SlowKernelsWarning
from ._define import DECLARED, LIBRARY, without_autocast

NATIVE = _native.load()
COMPILED = NATIVE == "loaded"
_FUNCTION = re.compile(r"^def (\w+)\(", re.MULTILINE)


def register_kernels() -> None:
    """Registers the GPU kernels of the declared ops, and a warning on the CPU if the compiled extension is missing.

    The GPU kernel of an op is the function of its name in ``ops/_vendor.py``, which calls a library that comes with
    PyTorch, or the launcher of its name in ``triton_kernels/``, if Triton is installed. The compiled extension
    registers its CPU kernels itself.
    """
    launchers, vendor = find_launchers(), import_module("sparsekit.ops._vendor")
    for op, declared in DECLARED.items():
        if hasattr(vendor, op):
            LIBRARY.impl(op, without_autocast(getattr(vendor, op)), "CUDA")
        elif op in launchers:
            LIBRARY.impl(op, _launcher(declared.stem, op), "CUDA")
        if declared.compiled and NATIVE not in ("loaded", _native.SWITCHED_OFF):
            LIBRARY.impl(op, _slow(declared.reference), "CPU")


def find_launchers() -> set[str]:
    """Returns the ops with a launcher in the file of their stem in ``triton_kernels/``; does not import Triton."""
    package = find_spec("sparsekit.triton_kernels")
    if find_spec("triton") is None or package is None or package.origin is None:
        return set()
    files = {stem: Path(package.origin).with_name(f"{stem}.py") for stem in {each.stem for each in DECLARED.values()}}
    functions = {
        stem: set(_FUNCTION.findall(file.read_text(encoding="utf-8"))) for stem, file in files.items() if file.exists()
    }
    return {op for op, declared in DECLARED.items() if op in functions.get(declared.stem, ())}


def call_kernel(op: Any, x: Tensor, *args: Any) -> Tensor | None:
    """Calls the compiled CPU kernel of a product, below autograd and without any check of the arguments in Python.

    Returns:
        What the kernel computes; None where there is none, or ``x`` is on another device.

    Raises:
        RuntimeError, ValueError: the tensors do not fit together, or are on two devices. The public function of the op
            says what does not fit.
    """
    if not COMPILED or not x.is_cpu:
        return None
    with torch._C._AutoDispatchBelowAutograd():
        return op._op(x, *args)


def _slow(reference: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        warn_slow()
        return reference(*args)

    return run


@cache
def warn_slow() -> None:
    """Warns once per process that the compiled extension is missing; the warning points to the caller's line."""
    warnings.warn(
        f"sparsekit computes in plain PyTorch, many times slower: the compiled extension is {missing_kernels()}, "
        "or set SPARSEKIT_NATIVE=0 to do without it",
        SlowKernelsWarning,
        stacklevel=_depth_of_caller(),
    )


def missing_kernels() -> str:
    """Returns why the compiled CPU kernels are missing, and how to get them; an empty string if they are there."""
    if NATIVE == "loaded":
        return ""
    if NATIVE == _native.SWITCHED_OFF:
        return f"{NATIVE}: unset it"
    why, command = _native.remedy(_native.PACKAGE)
    return f"{NATIVE}, {why}: get it with `{command}`"


def _depth_of_caller() -> int:
    """Returns the stack level of the first caller outside this package and PyTorch."""
    inside = (str(_native.PACKAGE), str(Path(torch.__file__).parent))
    frame, depth = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        frame, depth = frame.f_back, depth + 1
    return depth


def _launcher(stem: str, op: str) -> Callable[..., Any]:
    """Returns a function that imports the launcher, and Triton with it, when it is first called."""

    @cache
    def find() -> Callable[..., Any]:
        launcher: Callable[..., Any] = getattr(import_module(f"sparsekit.triton_kernels.{stem}"), op)
        return launcher

    return without_autocast(lambda *args: find()(*args))


def backends() -> dict[str, dict[str, str]]:
    """Returns which kernel runs each op on each device: ``{"nm_mask": {"cpu": "avx2", "cuda": "triton"}, ...}``.

    A compiled CPU kernel is named by its SIMD level. A GPU kernel is ``"triton"``, or ``"vendor"`` for a library that
    comes with PyTorch. ``"reference"`` is plain PyTorch.
    """
    return {op: {"cpu": _answers(op, "CPU"), "cuda": _answers(op, "CUDA")} for op in DECLARED}


def _answers(op: str, key: str) -> str:
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"sparsekit::{op}", key):
        return "reference"
    if key == "CPU":
        return simd_level()
    return "vendor" if hasattr(import_module("sparsekit.ops._vendor"), op) else "triton"


def simd_levels() -> tuple[str, ...]:
    """Returns the SIMD levels that this machine can run, the best last; empty without the compiled extension."""
    return tuple(torch.ops.sparsekit._simd_levels().split()) if NATIVE == "loaded" else ()


def simd_level() -> str:
    """Returns the SIMD level of the compiled CPU kernels; ``"reference"`` without the compiled extension."""
    return torch.ops.sparsekit._simd_level("") if NATIVE == "loaded" else "reference"


@contextmanager
def force_simd(level: str) -> Iterator[None]:
    """Runs the CPU kernels of the whole process at one SIMD level, for tests and measurements.

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
