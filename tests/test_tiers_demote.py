"""Tier maps, and which blocks are demoted."""

import math

import pytest
import torch

import sparsekit as sk
from sparsekit.tiers import Demotion, Ratios, TierMap, demote, demote_together, demotion_costs, tier_mask

SCHEDULE = ((0.9, 0.1, 0.0), (0.8, 0.1, 0.1), (0.65, 0.2, 0.15), (0.5, 0.3, 0.2), (0.35, 0.45, 0.2))


def by_hand():
    """Blocks of 1 x 4, k = 1, scores as the weights: (16, 1, 0, 0), (3, 3, 3, 0), (9, 9, 8, 8)."""
    weight = torch.tensor([[4.0, 1, 0, 0, 3, 3, 3, 0, 9, 9, 8, 8]])
    return weight, weight.abs(), TierMap.dense(weight, (1, 4), k=1)


def test_costs_by_hand():
    weight, score, tier_map = by_hand()
    first, second = demotion_costs(weight, score, tier_map)
    assert first.tolist() == [[0, 9, 128]] and second.tolist() == [[1, 9, 81]]
    first, second = demotion_costs(weight, score, tier_map, "published")
    assert first.tolist() == [[5, 9, 34]] and second.tolist() == [[5, 6, 18]]


def test_demotes_the_cheapest_and_all_2_4_blocks_compete_for_topk():
    weight, score, tier_map = by_hand()
    new, demotion = demote(weight, score, tier_map, (1 / 3, 1 / 3, 1 / 3))
    assert new.tiers.tolist() == [[2, 1, 0]] and demotion == Demotion(2, 1, Ratios(1 / 3, 1 / 3, 1 / 3))
    assert tier_map.tiers.tolist() == [[0, 0, 0]]  # untouched
    assert tier_mask(weight, score, new).int().tolist() == [[1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 1]]
    later, demotion = demote(weight, score, new, (0, 1 / 3, 2 / 3))
    assert later.tiers.tolist() == [[2, 2, 1]] and (demotion.dense_to_2_4, demotion.mid_2_4_to_topk) == (1, 1)


def test_published_golden():
    """Maps, non-zeros and sums that the published pruner gives on this weight."""
    weight = torch.tensor([[math.sin(1 + 64 * i + j) for j in range(64)] for i in range(64)])
    norm = (1 + torch.arange(64) % 7).float().sqrt()
    tier_map = TierMap.dense(weight)
    for target, row, kept, total in (
        ((0.75, 0.25, 0.0), [1, 0, 0, 0], 3584, 1.0565),
        ((0.5, 0.25, 0.25), [2, 0, 0, 1], 2600, 0.6438),
    ):
        score = weight.abs() * norm
        tier_map, _ = demote(weight, score, tier_map, target, criterion="published")
        weight = torch.where(tier_mask(weight, score, tier_map, "published"), weight, 0)
        assert tier_map.tiers.tolist() == [row] * 4
        assert (weight != 0).sum() == kept and weight.sum().item() == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize("criterion", ["published", "loss"])
def test_counts_of_the_shipped_schedule(criterion):
    """64x64 blocks; the published rule rounds down at every step, ours to the nearest."""
    weight, tier_map, moved, sparsity = torch.randn(1024, 1024), None, [], []
    tier_map = TierMap.dense(weight)
    for target in SCHEDULE:
        before = tier_map.tiers
        tier_map, demotion = demote(weight, weight.abs(), tier_map, target, criterion=criterion)
        assert (tier_map.tiers >= before).all()
        weight = torch.where(tier_mask(weight, weight.abs(), tier_map, criterion), weight, 0)
        moved.append((demotion.dense_to_2_4, demotion.mid_2_4_to_topk))
        sparsity.append(round((weight == 0).float().mean().item(), 4))
        assert tier_map.sparsity == pytest.approx(sparsity[-1], abs=6e-5)
    if criterion == "published":
        assert moved == [(409, 0), (410, 409), (614, 204), (615, 206), (614, 0)]
        assert sparsity == [0.0499, 0.146, 0.2439, 0.3422, 0.4171]
    else:
        assert tier_map.counts == (1434, 1843, 819)


def test_loss_keeps_more_of_the_output_at_equal_ratios():
    weight, x = torch.randn(256, 256), torch.randn(500, 256) * torch.randn(256).exp()
    score, error = weight.abs() * x.square().mean(0).sqrt(), {}
    for criterion in ("loss", "published"):
        tier_map, _ = demote(weight, score, TierMap.dense(weight), SCHEDULE[-1], criterion=criterion)
        lost = torch.where(tier_mask(weight, score, tier_map, criterion), 0, weight)
        error[criterion] = (x @ lost.t()).norm()
    assert error["loss"] < 0.95 * error["published"]


def test_together_the_cheapest_go_wherever_they_are():
    costs = [(torch.tensor([[1.0, 8.0]]), torch.tensor([[9.0, 9.0]])), (torch.tensor([[2.0, 3.0]]), torch.ones(1, 2))]
    maps = [TierMap(torch.zeros(1, 2, dtype=torch.uint8), (4, 8), (4, 4), 1) for _ in costs]
    new, demotions = demote_together(maps, costs, (0.25, 0.5, 0.25))
    assert [each.tiers.tolist() for each in new] == [[[1, 0]], [[2, 1]]]
    assert [(each.dense_to_2_4, each.mid_2_4_to_topk) for each in demotions] == [(1, 0), (2, 1)]


@pytest.mark.parametrize("shape", [(33, 50), (16, 16), (5, 7), (0, 16)], ids=str)
def test_edges_and_blocks_of_any_size(shape):
    weight = torch.randn(shape)
    tier_map = TierMap.dense(weight, (32, 8), k=3)
    new, _ = demote(weight, weight.abs(), tier_map, (0.0, 0.5, 0.5))
    mask = tier_mask(weight, weight.abs(), new)
    assert torch.equal(mask, sk.tier_prune(weight, new.tiers, 3, (32, 8))[1])
    assert new.sparsity == pytest.approx((~mask).float().mean().item() if weight.numel() else 0, abs=0.06)


def test_equal_blocks_go_first_come_first():
    weight = torch.ones(4, 16)
    tier_map, _ = demote(weight, weight, TierMap.dense(weight, (4, 4), 1), (0.5, 0.25, 0.25))
    assert tier_map.tiers.tolist() == [[2, 1, 0, 0]]


def test_a_picture_and_a_line_of_text():
    tier_map = TierMap(torch.tensor([[0, 1], [2, 1]], dtype=torch.uint8), (32, 32))
    picture = tier_map.picture()
    assert picture.shape == (2, 2, 3) and picture.dtype == torch.uint8
    assert len({tuple(pixel) for pixel in picture.flatten(0, 1).tolist()}) == 3 and torch.equal(*picture[:, 1])
    assert str(tier_map) == "4 blocks of 16x16: 25.0% dense, 50.0% 2:4, 25.0% top-10; 49.02% sparse"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda t: TierMap(t.int(), (32, 32)), TypeError, "tiers must be uint8, got torch.int32"),
        (lambda t: TierMap(t, (32, 50)), ValueError, r"shape \(2, 4\) for a weight of \(32, 50\), got \(2, 2\)"),
        (lambda t: TierMap(t + 3, (32, 32)), ValueError, r"a tier is 0 \(dense\), 1 \(2:4\) or 2 \(top-k\), got 3"),
        (lambda t: TierMap(t, (32, 32), k=257), ValueError, "k must be from 0 to 256, the size of a block, got 257"),
        (lambda t: TierMap(t, (32, 32), (16, 6)), ValueError, r"a multiple of 4, got \(16, 6\)"),
    ],
)
def test_rejects_maps_that_are_none(make, error, message):
    with pytest.raises(error, match=message):
        make(torch.zeros(2, 2, dtype=torch.uint8))


def test_rejects_what_does_not_fit():
    weight, score, tier_map = by_hand()
    with pytest.raises(ValueError, match=r"add up to 1, got \(0.5, 0.4, 0.2\)"):
        demote(weight, score, tier_map, (0.5, 0.4, 0.2))
    with pytest.raises(ValueError, match=r"must have the map's shape \(1, 12\), got \(1, 12\) and \(1, 8\)"):
        demote(weight, score[:, :8], tier_map, (1, 0, 0))
    with pytest.raises(ValueError, match='criterion must be "loss" or "published", got \'best\''):
        demote(weight, score, tier_map, (1, 0, 0), criterion="best")
