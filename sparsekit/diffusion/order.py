"""Orders in which the tokens of a row are predicted, and the loss of the chain rule in such an order."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from .absorbing import MaskedModel, check_tokens, draw_uniform, token_losses

Order: TypeAlias = Literal["forward", "backward", "random"] | Sequence[int]


def ordered_loss(
    model: MaskedModel,
    tokens: Tensor,
    mask_token: int,
    order: Order = "forward",
    *,
    batch_size: int = 16,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Computes the loss of the chain rule in one order, ``sum_i -log q(x_order[i] | x_order[<i])``.

    Published as ``ar_forward``, ``ar_backward`` and ``ar_random``. The mean over all orders is the bound that the other
    losses estimate from far fewer predictions: this takes one for each token.

    Args:
        model: predicts masked tokens; see ``sparsekit.diffusion.absorbing``.
        tokens: int64 ``[rows, length]`` without the mask token.
        mask_token: the number of the mask token.
        order: ``"forward"``, ``"backward"``, ``"random"`` (one for each row), or all positions in the order in which
            they are predicted.
        batch_size: how many predictions are made at once.
        generator: what random orders are drawn from, on any device; None is the global random state.

    Returns:
        ``[rows]`` in nats, float32 or the wider dtype of the model's.

    Raises:
        ValueError: ``order`` is none, or what ``t_dse_loss`` raises.
    """
    check_tokens(tokens, mask_token)
    rows, length = tokens.shape
    turns = order_turns(
        order, draw_uniform(tokens, generator) if isinstance(order, str) and order == "random" else tokens
    )
    calls = torch.arange(rows * length, device=tokens.device)
    losses = []
    for call in calls.split(batch_size):
        row, turn = call // length, (call % length)[:, None]
        losses.append(token_losses(model, tokens[row], mask_token, turns[row] >= turn, turns[row] == turn).sum(1))
    return torch.cat(losses).view(rows, length).sum(1)


def order_turns(order: Order, keys: Tensor) -> Tensor:
    """Returns when each position is predicted, counted from 0, int64 ``[rows, length]``.

    Args:
        order: as in ``ordered_loss``.
        keys: ``[rows, length]``, random numbers by which random orders are sorted.

    Raises:
        ValueError: ``order`` is neither a known one nor one of all positions.
    """
    rows, length = keys.shape
    forward = torch.arange(length, device=keys.device)
    if isinstance(order, str):
        if order not in ("forward", "backward", "random"):
            raise ValueError(f"order must be forward, backward, random or all positions, got {order!r}")
        return (
            keys.argsort(1).argsort(1)
            if order == "random"
            else (forward if order == "forward" else forward.flip(0)).expand(rows, length)
        )
    if sorted(order) != [*range(length)]:
        raise ValueError(f"order must have each position from 0 to {length - 1} once, got {len(order)} numbers")
    return torch.tensor([*order], device=keys.device).argsort().expand(rows, length)
