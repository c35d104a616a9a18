"""Checks of the arguments of ``MaskPro``."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..masks import Pattern
from ..ops._define import check_ints
from .advantage import LARGEST_MULTIPLIER


def learnable_pattern(pattern: str) -> Pattern:
    """Parses a pattern ``"n:m"`` with n < m.

    Raises:
        ValueError: it is another one.
    """
    parsed = Pattern.parse(pattern)
    if parsed.m is None or parsed.n == parsed.m:
        raise ValueError(f'MaskPro needs a pattern "n:m" with n < m, got {pattern!r}')
    return parsed


def check_arguments(
    axis: str,
    lr: float | None,
    multiplier: float | None,
    flips: float | None,
    draws: int,
    microbatches: int,
    seed: int,
    dtype: torch.dtype | None,
    parity: bool,
) -> None:
    """Checks what can be checked without the model.

    Raises:
        TypeError: a count is no integer.
        ValueError: one is out of range, or two of them exclude each other.
    """
    if axis not in ("input", "flatten"):
        raise ValueError(f'axis must be "input" or "flatten", got {axis!r}')
    check_ints(draws=draws, microbatches=microbatches, seed=seed)
    numbers = {"lr": lr, "multiplier": multiplier, "flips": flips, "draws": draws, "microbatches": microbatches}
    for name, value in numbers.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive, got {value}")
    if multiplier is not None and multiplier > LARGEST_MULTIPLIER:
        raise ValueError(f"multiplier must be at most {LARGEST_MULTIPLIER:g}, got {multiplier}")
    if multiplier is not None and flips is not None:
        raise ValueError("multiplier follows from flips: pass one of the two")
    if parity and draws != 1:
        raise ValueError(f"the published rule draws one mask for each batch: with parity, draws is 1, got {draws}")
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"dtype must be torch.float32, torch.bfloat16 or None, got {dtype}")


def check_state(state: Mapping[str, Any], own: Mapping[str, Any], call: Mapping[str, Any]) -> None:
    """Checks a state that a learner is to go on from.

    Args:
        state: the state.
        own: that of the learner now.
        call: the part of it that must be the same.

    Raises:
        ValueError: names what is missing or differs.
    """
    for key, value in call.items():
        if state.get(key) != value:
            raise ValueError(f"it has {key} {state.get(key)}, and this learner {value}")
    for key, value in own.items():
        if key not in state:
            raise ValueError(f"it has no {key!r}: pass what state_dict() of a MaskPro returned")
        if isinstance(value, Tensor):
            given, found = state[key], None
            if isinstance(given, Tensor):
                found = f"{given.dtype} {tuple(given.shape)}"
            if found != (needed := f"{value.dtype} {tuple(value.shape)}"):
                raise ValueError(f"{key} must be {needed}, got {found or type(given).__name__}")
