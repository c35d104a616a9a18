"""Which blocks of a weight a demotion costs least, and the mask that a tier map puts on it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..ops import block_scores, tier_prune
from ..ops.tiers import DENSE, SPARSE24, TOPK
from .tier_map import Ratios, TierMap

Criterion = Literal["loss", "published"]
Costs = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Demotion:
    """What was demoted of one weight: blocks from dense to 2:4 and from 2:4 to top-k, and the shares reached."""

    dense_to_2_4: int
    mid_2_4_to_topk: int
    ratios: Ratios


def tier_mask(weight: Tensor, score: Tensor, tier_map: TierMap, criterion: Criterion = "loss") -> Tensor:
    """The bool mask that a tier map puts on a weight.

    Args:
        weight: ``[rows, cols]``; in blocks that are not dense, what is zero in it ranks last.
        score: float32 ``[rows, cols]``, such as ``weight.abs() * norm``; its order chooses inside the blocks.
        tier_map: the tiers of its blocks.
        criterion: ``"published"`` chooses by the bare magnitude, and top-k among what 2:4 leaves.
    """
    tiers, k, block = tier_map.tiers, tier_map.k, tier_map.block
    if criterion == "published":
        weight = tier_prune(weight, tiers.clamp(max=SPARSE24), k, block)[0]
        return tier_prune(weight, tiers, k, block)[1]
    least = torch.finfo(score.dtype).tiny  # kept weights of inputs that are always 0 still rank before dropped ones
    return tier_prune(torch.where(weight != 0, score.clamp(min=least), 0), tiers, k, block)[1]


def demote(
    weight: Tensor,
    score: Tensor,
    tier_map: TierMap,
    target: tuple[float, float, float],
    *,
    criterion: Criterion = "loss",
) -> tuple[TierMap, Demotion]:
    """Moves blocks of one weight down until the wanted shares are reached: dense to 2:4, then 2:4 to top-k.

    One way only, and in two stages: all 2:4 blocks, the new ones too, compete for top-k. Of equal blocks the first go.

    Args:
        weight: ``[rows, cols]``, as fine-tuned last.
        score: float32 ``[rows, cols]``, not negative: ``weight.abs() * norm``.
        tier_map: where the blocks are now; not changed.
        target: the dense, 2:4 and top-k shares to reach. A share that is reached already demotes nothing.
        criterion: ``"loss"`` demotes the blocks that lose the least squared score, which is what the layer's squared
            output error grows by if inputs are uncorrelated. ``"published"`` demotes the blocks with the lowest sum of
            scores, as the published three-tier pruner does, and rounds the numbers of blocks down as it does.

    Returns:
        The new map, and what was moved.

    Raises:
        ValueError: shapes that do not fit, shares that do not add up to 1, or an unknown criterion.
    """
    ((new,), (demotion,)) = demote_together(
        [tier_map], [demotion_costs(weight, score, tier_map, criterion)], target, criterion=criterion
    )
    return new, demotion


def demotion_costs(weight: Tensor, score: Tensor, tier_map: TierMap, criterion: Criterion = "loss") -> Costs:
    """What demoting each block costs, float32 ``[R, C]`` each: from dense to 2:4, and from 2:4 to top-k.

    Arguments and errors are those of ``demote``. All blocks are scored, wherever they are.
    """
    if criterion not in ("loss", "published"):
        raise ValueError(f'criterion must be "loss" or "published", got {criterion!r}')
    if tuple(weight.shape) != tier_map.shape or score.shape != weight.shape:
        raise ValueError(
            f"weight and score must have the map's shape {tier_map.shape}, "
            f"got {tuple(weight.shape)} and {tuple(score.shape)}"
        )
    k, block = tier_map.k, tier_map.block
    middle, last = (torch.full_like(tier_map.tiers, tier) for tier in (SPARSE24, TOPK))
    if criterion == "published":
        return block_scores(score, block), block_scores(score, block, mask=tier_prune(weight, middle, k, block)[1])
    squares = torch.where(weight != 0, score, 0).square()
    lost = [block_scores(squares, block, mask=~tier_prune(squares, tiers, k, block)[1]) for tiers in (middle, last)]
    return lost[0], lost[1] - lost[0]


def demote_together(
    tier_maps: Sequence[TierMap],
    costs: Sequence[Costs],
    target: tuple[float, float, float],
    *,
    criterion: Criterion = "loss",
) -> tuple[list[TierMap], list[Demotion]]:
    """Like ``demote`` for several weights that share the numbers of blocks: the cheapest go, wherever they are.

    Args:
        tier_maps: one per weight; not changed.
        costs: ``demotion_costs`` of each, in units that compare between the weights.
        target: the shares of all blocks together.
        criterion: decides how the numbers of blocks are rounded, see ``demote``.
    """
    check_shares(target)
    sizes = [tier_map.tiers.numel() for tier_map in tier_maps]
    tiers = torch.cat([tier_map.tiers.flatten() for tier_map in tier_maps])
    moved = []
    for tier, share, stage in zip((DENSE, SPARSE24), target, zip(*costs, strict=True), strict=False):
        count = _count(tiers, tier, share, criterion)
        cheapest = _cheapest(tiers == tier, torch.cat([cost.flatten() for cost in stage]), count)
        tiers = tiers.index_fill(0, cheapest, tier + 1)
        moved.append(torch.zeros_like(tiers).index_fill(0, cheapest, 1).split(sizes))
    new = [
        replace(tier_map, tiers=own.view(tier_map.tiers.shape))
        for tier_map, own in zip(tier_maps, tiers.split(sizes), strict=True)
    ]
    first, second = ([int(part.sum()) for part in stage] for stage in moved)
    return new, [Demotion(*each) for each in zip(first, second, (tier_map.ratios for tier_map in new), strict=True)]


def _count(tiers: Tensor, tier: int, share: float, criterion: Criterion) -> int:
    """How many blocks of a tier are too many."""
    total, now = len(tiers), int((tiers == tier).sum())
    many = int(total * (now / max(total, 1) - share)) if criterion == "published" else now - round(total * share)
    return max(many, 0)


def _cheapest(candidates: Tensor, costs: Tensor, count: int) -> Tensor:
    """The indices of the ``count`` cheapest candidates, the first ones of equals."""
    order = torch.where(candidates, costs, torch.inf).sort(stable=True).indices
    return order[:count]


def check_shares(shares: tuple[float, float, float]) -> None:
    """Rejects what are not three shares of one whole."""
    if len(shares) != 3 or any(not 0 <= share <= 1 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"dense, 2:4 and top-k shares must be from 0 to 1 and add up to 1, got {tuple(shares)}")
