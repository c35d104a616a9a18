"""The rounding of tokens to a few integers, as every product with 8-bit inputs does it."""

import torch
from torch import Tensor

SMALLEST_INPUT = 1e-30  # the largest magnitude of a token counts as at least this, so that limit / it is finite


def round_to_integers(x: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Rounds each token to integers from ``-limit`` to ``limit``, ties to even.

    Args:
        x: ``[..., cols]``, float32.
        limit: the integer that the largest magnitude of a token becomes.

    Returns:
        The integers as float32, all 0 in a token that has an Inf or a NaN; and the largest magnitude of each token,
        ``[..., 1]``, NaN for such a token.
    """
    largest = x.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_INPUT)
    finite = largest.isfinite()
    factor = largest.new_tensor(limit) / largest  # a number over a tensor would be its reciprocal, rounded, times that
    return torch.where(finite, (x * factor).round(), 0), torch.where(finite, largest, torch.nan)
