"""Whether a hardware layout trains faster than a dense product: measured, once per kind of layer and token count."""

import statistics
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from ..compress.clock import clock
from ..compress.tune import RATIO, TOLERANCE
from .product import Recipe, multiply

MAX_TOKENS = 4096  # more are as good as this many for a ratio
ROUNDS = 9


class Kind(NamedTuple):
    """What the time of a training step depends on, besides the number of tokens."""

    device: torch.device
    dtype: torch.dtype
    shape: torch.Size
    transposable: bool
    layout: str


RATIOS: dict[Kind, dict[int, float]] = {}  # of the dense step's time to the layout's, by token bucket


def is_faster(kind: Kind, tokens: int) -> bool:
    """Whether a forward and backward pass in the layout is at least 1.05 times as fast as by a masked dense product.

    Measured at the first call for a power of two of tokens, as ``torch.backends.cudnn.benchmark`` does. A layout that
    fails, needs too much memory or gives wrong results has the ratio 0. While a CUDA graph is captured nothing can be
    measured: what is not known is not taken.
    """
    ratios = RATIOS.setdefault(kind, {})
    bucket = min(1 << max(tokens - 1, 0).bit_length(), MAX_TOKENS)
    if bucket not in ratios:
        if kind.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False
        # In a thread of its own, out of reach of what the caller's thread has switched on: hooks on saved tensors and
        # dispatch modes (activation checkpointing counts every tensor that is saved), autocast, inference mode.
        with ThreadPoolExecutor(1) as thread:
            ratios[bucket] = thread.submit(_measure, kind, bucket).result()
    return ratios[bucket] >= RATIO


def _measure(kind: Kind, tokens: int) -> float:
    rows, cols = kind.shape
    generator = torch.Generator(kind.device).manual_seed(0)
    recipe = Recipe("transposable" if kind.transposable else "straight_through", 0.0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=kind.device, dtype=kind.dtype).requires_grad_()

    def step(x: Tensor, layout: str | None) -> tuple[Tensor, ...]:
        y = multiply(x, weight, None, recipe, layout)
        return y, *torch.autograd.grad(y, (x, weight), grad)

    if kind.device.type == "cuda":
        torch.cuda.synchronize(kind.device)  # what the caller's stream still computes would be in the way
    try:
        x, weight, grad = normal(tokens, cols), normal(rows, cols), normal(tokens, rows).detach()
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
