"""The draw of a token from log probabilities, by a uniform number that is given."""

import torch
from torch import Tensor

ROWS_AT_ONCE = 256  # of float64 numbers for a whole vocabulary


def choose_tokens(log_probs: Tensor, uniform: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Returns the token at which the cumulative probability passes each uniform number, int64 ``[positions]``.

    It is computed in float64: float32 would almost never draw rare tokens.

    Args:
        log_probs: ``[positions, vocabulary]``.
        uniform: float64 ``[positions]``, within 0 and 1.
        top_k: draws from this many of the likeliest tokens; None is all.
        top_p: draws from the fewest of the likeliest tokens that have at least this probability; None is all.

    Raises:
        ValueError: no token of a position has a probability.
    """
    chunks = zip(log_probs.split(ROWS_AT_ONCE), uniform.split(ROWS_AT_ONCE), strict=True)
    chosen = torch.cat([_choose(rows.double(), numbers, top_k, top_p) for rows, numbers in chunks])
    if (chosen >= log_probs.shape[1]).any():
        raise ValueError("log probabilities must be numbers, and not minus infinity for all tokens of a position")
    return chosen


def check_choice(top_k: int | None, top_p: float | None) -> None:
    """Rejects options of ``choose_tokens`` that are out of range.

    Raises:
        ValueError: names the option.
    """
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")


def _choose(log_probs: Tensor, uniform: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    if top_k is not None or top_p is not None:
        log_probs = _likeliest(log_probs, top_k, top_p)
    below = log_probs.exp().cumsum(1).contiguous()
    total = below[:, -1]
    passed = torch.minimum(uniform * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(below, passed[:, None], right=True)[:, 0]


def _likeliest(log_probs: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Returns log probabilities with minus infinity at all tokens but the likeliest."""
    values, tokens = log_probs.sort(dim=1, descending=True, stable=True)
    if top_k is not None:
        values[:, top_k:] = -torch.inf
    if top_p is not None:
        probability = values.softmax(1)
        values[probability.cumsum(1) - probability >= top_p] = -torch.inf
    return torch.full_like(log_probs, -torch.inf).scatter(1, tokens, values)
