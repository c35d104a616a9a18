"""Moves the blocks of a weight whose demotion costs least to a smaller tier, and prunes a weight by its tier map."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..ops import block_scores, nm_mask, tier_prune, tier_scores
from ..ops.bits import nonzero
from ..ops.tiers import DENSE, SPARSE24
from .tier_map import Ratios, TierMap

Criterion = Literal["loss", "published"]
Costs = tuple[Tensor, Tensor]
LEAST = 1e-18  # the smallest score of a kept weight; its square is not a denormal number yet


@dataclass(frozen=True)
class Demotion:
    """The numbers of blocks of one weight that moved from dense to 2:4 and from 2:4 to top-k, and the shares now."""

    dense_to_2_4: int
    mid_2_4_to_topk: int
    ratios: Ratios


def tier_mask(weight: Tensor, score: Tensor, tier_map: TierMap, criterion: Criterion = "loss") -> Tensor:
    """Returns the mask, bool of the weight's shape, by which ``prune_tiers`` prunes a weight with these arguments."""
    return prune_tiers(weight, score, tier_map, criterion)[1]


def prune_tiers(
    weight: Tensor, score: Tensor, tier_map: TierMap, criterion: Criterion = "loss"
) -> tuple[Tensor, Tensor]:
    """Prunes a weight by its tier map, and returns ``(pruned, mask)``.

    Args:
        weight: ``[rows, cols]``; in 2:4 and top-k blocks, its zeros are dropped first.
        score: decides which entries of a block are kept, see ``demote``.
        tier_map: the tiers of the weight's blocks.
        criterion: ``"published"`` ranks by magnitude alone, and chooses top-k among the entries that 2:4 keeps.
    """
    tiers, k, block = tier_map.tiers, tier_map.k, tier_map.block
    if criterion == "published":
        return tier_prune(weight, tiers, k, block, nested=True)[:2]
    ranked, scale = _ranked(weight, score)
    pruned, mask, _ = tier_prune(ranked, tiers, k, block, scale=scale)
    return pruned if ranked is weight else torch.where(mask, weight, 0), mask


def _ranked(weight: Tensor, score: Tensor) -> tuple[Tensor, Tensor | None]:
    """Returns a tensor to rank and the scale of its columns.

    If all inputs of a column are zero, its kept weights have a small positive score, and so rank before dropped ones.
    """
    if score.dim() == 1:
        return weight, score.clamp(min=LEAST)
    return torch.where(nonzero(weight), score.clamp(min=LEAST), 0), None


def demote(
    weight: Tensor,
    score: Tensor,
    tier_map: TierMap,
    target: tuple[float, float, float],
    *,
    criterion: Criterion = "loss",
) -> tuple[TierMap, Demotion]:
    """Moves blocks of one weight from dense to 2:4, then from 2:4 to top-k, until the target shares are reached.

    Blocks never move back. All 2:4 blocks can become top-k, also those that have just become 2:4. Of equal blocks the
    first are moved.

    Args:
        weight: ``[rows, cols]``.
        score: float32, not negative: ``weight.abs() * norm``, ``[rows, cols]``; or the input norm alone, ``[cols]``,
            which is several times faster.
        tier_map: the tiers so far; not changed.
        target: the dense, 2:4 and top-k shares to reach. If a share is reached already, nothing is moved for it.
        criterion: ``"loss"`` demotes the blocks that lose the least squared score, by which the layer's squared output
            error grows if inputs are uncorrelated. ``"published"`` demotes the blocks with the lowest sum of scores,
            and rounds the numbers of blocks down, as the published three-tier pruner does.

    Returns:
        The new map, and the numbers of moved blocks.

    Raises:
        ValueError: the shapes do not fit, the shares do not add up to 1, or the criterion is unknown.
    """
    ((new,), (demotion,)) = demote_together(
        [tier_map], [demotion_costs(weight, score, tier_map, criterion)], target, criterion=criterion
    )
    return new, demotion


def demotion_costs(weight: Tensor, score: Tensor, tier_map: TierMap, criterion: Criterion = "loss") -> Costs:
    """Computes what demoting each block costs: from dense to 2:4 and from 2:4 to top-k, float32 ``[R, C]`` each.

    Arguments and errors are those of ``demote``. All blocks get both costs, whatever their tier is.
    """
    if criterion not in ("loss", "published"):
        raise ValueError(f'criterion must be "loss" or "published", got {criterion!r}')
    if tuple(weight.shape) != tier_map.shape or score.shape not in (weight.shape, weight.shape[1:]):
        raise ValueError(
            f"weight and score must have the map's shape {tier_map.shape}, got {tuple(weight.shape)} and "
            f"{tuple(score.shape)}; or score is one norm for each column"
        )
    k, block = tier_map.k, tier_map.block
    if criterion == "loss":
        ranked, scale = _ranked(weight, score)
        dense, sparse24, topk = tier_scores(ranked, k, block, scale=scale, score_scale=scale, squared=True)
        return dense - sparse24, sparse24 - topk
    if score.dim() == 1:
        dense, sparse24, _ = tier_scores(weight, 0, block, score_scale=score)
        return dense, sparse24
    return block_scores(score, block), block_scores(score, block, mask=nm_mask(weight, 2, 4))


def demote_together(
    tier_maps: Sequence[TierMap],
    costs: Sequence[Costs],
    target: tuple[float, float, float],
    *,
    criterion: Criterion = "loss",
) -> tuple[list[TierMap], list[Demotion]]:
    """Demotes the cheapest blocks of several weights until all blocks together reach the target shares.

    Args:
        tier_maps: one per weight; not changed.
        costs: the ``demotion_costs`` of each weight, in units that can be compared between weights.
        target: the dense, 2:4 and top-k shares of all blocks together.
        criterion: decides how the numbers of blocks are rounded, see ``demote``.

    Returns:
        The new maps, and the numbers of moved blocks of each weight.

    Raises:
        ValueError: the shares do not add up to 1.
    """
    check_shares(target)
    sizes = [tier_map.tiers.numel() for tier_map in tier_maps]
    tiers = torch.cat([tier_map.tiers.flatten() for tier_map in tier_maps])
    moved = []
    for tier, share, tier_costs in zip((DENSE, SPARSE24), target, zip(*costs, strict=True), strict=False):
        count = _count(tiers, tier, share, criterion)
        cheapest = _cheapest(tiers == tier, torch.cat([cost.flatten() for cost in tier_costs]), count)
        tiers = tiers.index_fill(0, cheapest, tier + 1)
        moved.append(torch.zeros_like(tiers).index_fill(0, cheapest, 1).split(sizes))
    new = [
        replace(tier_map, tiers=own.view(tier_map.tiers.shape))
        for tier_map, own in zip(tier_maps, tiers.split(sizes), strict=True)
    ]
    first, second = ([int(part.sum()) for part in parts] for parts in moved)
    return new, [Demotion(*each) for each in zip(first, second, (tier_map.ratios for tier_map in new), strict=True)]


def _count(tiers: Tensor, tier: int, share: float, criterion: Criterion) -> int:
    """Returns how many blocks of a tier must be demoted."""
    total, now = len(tiers), int((tiers == tier).sum())
    many = int(total * (now / max(total, 1) - share)) if criterion == "published" else now - round(total * share)
    return max(many, 0)


def _cheapest(candidates: Tensor, costs: Tensor, count: int) -> Tensor:
    """Returns the indices of the ``count`` cheapest candidates; of equal ones, the first."""
    where = candidates.nonzero().flatten()
    if not count:
        return where[:0]
    costs = costs[where]
    limit = costs.kthvalue(count).values  # a quarter of the time of a stable sort
    less, equal = costs < limit, costs == limit
    return where[less | (equal & (equal.cumsum(0) <= count - less.sum()))]


def check_shares(shares: tuple[float, float, float]) -> None:
    """Rejects shares that are not three numbers from 0 to 1 that add up to 1."""
    if len(shares) != 3 or any(not 0 <= share <= 1 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"dense, 2:4 and top-k shares must be from 0 to 1 and add up to 1, got {tuple(shares)}")
