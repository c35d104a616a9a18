"""Assigns a form to every layer: the least total error that saves enough time."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

STEPS = 10_000  # of the time to save: what a layer saves is rounded down to whole steps


class Offer(NamedTuple):
    """What one way to change a layer saves, and what it costs.

    Args:
        saving: seconds; not positive where it is as slow as the layer or slower.
        cost: an error that adds up over layers.
    """

    saving: float
    cost: float


def least_cost(offers: Sequence[Sequence[Offer]], need: float) -> list[int] | None:
    """Returns the index of one offer for each layer, so that they save ``need`` seconds together at the least cost.

    This is a knapsack with one item from each group, solved by dynamic programming over the layers and the time saved
    so far. Savings count in steps of 1/10 000 of ``need``, rounded down, and one step for each layer is let off: no
    choice that saves enough is missed, and what is returned is short of ``need`` by less than that.

    Returns:
        The indices; None where even the largest savings are not enough.
    """
    saved = torch.arange(STEPS + 1, device="cpu")
    least = torch.full((STEPS + 1,), torch.inf, dtype=torch.float64, device="cpu")
    least[0] = 0
    picks = []
    for layer in offers:
        steps = [min(max(int(offer.saving / need * STEPS), 0), STEPS) for offer in layer]
        before = [(saved - each).clamp(min=0) for each in steps]
        totals = torch.stack([least[index] + offer.cost for index, offer in zip(before, layer, strict=True)])
        least, pick = totals.min(0)
        picks.append((pick, steps))
    enough = max(STEPS - len(offers), 0)
    if not torch.isfinite(least[enough]):
        return None
    chosen, left = [], enough
    for pick, steps in reversed(picks):
        index = int(pick[left])
        chosen.append(index)
        left = max(left - steps[index], 0)
    return chosen[::-1]


def most_saving(offers: Sequence[Sequence[Offer]]) -> list[int]:
    """Returns the index of the offer that saves most for each layer; of equal ones, that of the least cost."""
    return [max(range(len(layer)), key=lambda i: (layer[i].saving, -layer[i].cost)) for layer in offers]
