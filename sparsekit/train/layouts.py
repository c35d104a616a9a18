"""Chooses the hardware layout that a weight trains in: one that its device has, and that was measured to be faster."""

import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from .._timing import RATIO, TOLERANCE, clock
from ..ops import hardware_layouts
from ..ops.hardware24 import MULTIPLES
from .product import Recipe, multiply

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

MAX_TOKENS = 4096  # with more tokens the ratio is about the same
ROUNDS = 9


def traced_as_constant(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Makes ``torch.compile`` call a function once and keep the result as a constant.

    ``torch.compiler.assume_constant_result`` does the same, but imports the compiler, which takes three seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def hardware_layout(
    device: torch.device, dtype: torch.dtype, shape: torch.Size, transposable: bool
) -> tuple[str | None, str]:
    """Returns the hardware layout in which a device can multiply by such a weight; or None, and the reason.

    Without a layout, a layer masks its weight in one more pass over it, and multiplies by it as a dense layer does.

    Args:
        device, dtype: the device of the product, and the dtype it is computed in.
        shape: the shape of the weight, ``[rows, cols]``.
        transposable: whether the transpose of the weight is packed too.
    """
    names, reason = _packable_layouts(device)
    rows, cols = shape
    if dtype not in (torch.float16, torch.bfloat16):
        return None, f"it computes in {dtype}, not float16 or bfloat16" if names else reason
    for name in names:
        row_multiple, col_multiple = MULTIPLES[name]
        if transposable:
            row_multiple = col_multiple = max(row_multiple, col_multiple)
        if rows % row_multiple == 0 and cols % col_multiple == 0:
            return name, ""
        reason = f"{rows} x {cols} is no multiple of the {row_multiple} x {col_multiple} of {name}"
    return None, reason


@traced_as_constant
def _packable_layouts(device: torch.device) -> tuple[tuple[str, ...], str]:
    """Returns the layouts of a device in which this library can pack a weight; the reason if there is none."""
    names, reason = hardware_layouts(device)
    return tuple(name for name in names if name in MULTIPLES), reason


class StepKind(NamedTuple):
    """All that the duration of a training step depends on, except for the token count."""

    device: torch.device
    dtype: torch.dtype
    shape: torch.Size
    transposable: bool
    layout: str


# The seconds of a dense step divided by those of a step in the layout, by token bucket.
RATIOS: dict[StepKind, dict[int, float]] = {}


def is_faster(kind: StepKind, tokens: int) -> bool:
    """Returns whether a training step in the layout is at least 1.05 times as fast as by a masked dense product.

    Like ``torch.backends.cudnn.benchmark``, the first call for each token bucket measures this. A layout that fails,
    needs too much memory or gives wrong results gets the ratio 0. While a CUDA graph is captured nothing can be
    measured, so the result is False unless the ratio is known.
    """
    ratios = RATIOS.setdefault(kind, {})
    bucket = min(1 << max(tokens - 1, 0).bit_length(), MAX_TOKENS)
    if bucket not in ratios:
        if kind.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False
        # Another thread is not affected by what the caller's thread has switched on: autocast, inference mode, hooks on
        # saved tensors and dispatch modes (activation checkpointing counts every tensor that is saved).
        with ThreadPoolExecutor(1) as thread:
            ratios[bucket] = thread.submit(_measure_ratio, kind, bucket).result()
    return ratios[bucket] >= RATIO


def _measure_ratio(kind: StepKind, tokens: int) -> float:
    rows, cols = kind.shape
    generator = torch.Generator(kind.device).manual_seed(0)
    recipe = Recipe("transposable" if kind.transposable else "straight_through", 0.0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=kind.device, dtype=kind.dtype).requires_grad_()

    def step(x: Tensor, layout: str | None) -> tuple[Tensor, ...]:
        y = multiply(x, weight, None, recipe, layout)
        return y, *torch.autograd.grad(y, (x, weight), grad)

    if kind.device.type == "cuda":
        torch.cuda.synchronize(kind.device)  # work that the caller has queued would disturb the measurement
    try:
        x, weight, grad = randn(tokens, cols), randn(rows, cols), randn(tokens, rows).detach()
        calls = [lambda x: step(x, None)[0], lambda x: step(x, kind.layout)[0]]
        if not all(_agree(one, other) for one, other in zip(step(x, None), step(x, kind.layout), strict=True)):
            return 0.0
        timer = clock(kind.device, evict_cache=False)
        timer.start(calls[0], x)
        rounds = [[timer.seconds(call, x) for call in calls] for _ in range(ROUNDS)]
    except RuntimeError:  # the library refuses the shape, or there is no memory for both
        return 0.0
    return statistics.median(dense / sparse for dense, sparse in rounds)


def _agree(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().amax() <= TOLERANCE[one.dtype] * one.abs().amax())
