"""What the criterion of the library gains over the published one, on trained language models."""

import copy

import pytest
import torch
from language import MODELS

from sparsekit.masks import get_mask
from sparsekit.tiers import Ratios, Step, TierMap, TierOptions, demote, prune_tiers, tier_iteration, tier_mask

# Quarters, so that matrices of few blocks reach the same shares by either rule of rounding.
SHARES = ((0.75, 0.25, 0.0), (0.5, 0.25, 0.25), (0.25, 0.5, 0.25))


def test_what_was_dropped_stays_dropped_where_inputs_are_dead():
    """All scores are 0: the weights that are left rank before those that are gone."""
    weight = torch.tensor([[0.0, 0, 5, 6, 0, 7, 0, 0]])
    for tier, k in ((1, 2), (2, 3)):
        tier_map = TierMap(torch.tensor([[tier]], dtype=torch.uint8), (1, 8), (1, 8), k)
        for score in (torch.zeros(1, 8), torch.zeros(8)):
            assert (tier_mask(weight, score, tier_map) >= (weight != 0)).all()


@pytest.mark.parametrize("criterion", ["published", "loss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_norm_stands_for_the_score(criterion, dtype):
    weight, norm = torch.randn(70, 100).to(dtype), torch.rand(100) + 0.1
    weight[:, 7], norm[9] = 0, 0
    tier_map, score = TierMap.dense(weight), weight.abs().float() * norm
    for shares in SHARES:
        maps = [demote(weight, given, tier_map, shares, criterion=criterion)[0] for given in (score, norm)]
        assert torch.equal(maps[0].tiers, maps[1].tiers)
        (pruned, mask), others = (prune_tiers(weight, given, maps[0], criterion) for given in (score, norm))
        assert torch.equal(mask, others[1]) and torch.equal(pruned, others[0])
        assert torch.equal(pruned, torch.where(mask, weight, 0))
        weight, tier_map = pruned, maps[0]


@pytest.fixture(
    scope="module",
    params=["stories260K", pytest.param("shakespeare", marks=pytest.mark.slow)],  # the second is trained
)
def language(request, data):
    return MODELS[request.param](data)


def step(index, shares):
    return Step(index, Ratios(*shares), 0.0, 0.0, 1.0)


@pytest.mark.parametrize("allocation", ["layer", "model"])
def test_the_loss_criterion_keeps_more_of_the_output_at_equal_ratios(language, allocation):
    errors, sparsity = {}, {}
    for criterion in ("published", "loss"):
        model = copy.deepcopy(language.model)
        options = TierOptions(criterion=criterion, allocation=allocation)
        maps, report = tier_iteration(model, step(1, SHARES[-1]), language.batches, options=options)
        assert report.ratios == SHARES[-1]
        if allocation == "layer":
            assert all(tier_map.ratios == SHARES[-1] for tier_map in maps.values())
        errors[criterion], sparsity[criterion] = language.errors(model), report.sparsity
    assert errors["loss"].mean() < 0.97 * errors["published"].mean()
    assert sparsity["loss"] >= sparsity["published"]  # no error is saved by keeping more at the edges
    if allocation == "layer":
        ratio = errors["loss"] / errors["published"]
        assert (ratio < 1).float().mean() > 0.75 and ratio.max() < 1.25


@pytest.mark.parametrize("criterion", ["published", "loss"])
def test_demotion_is_monotone_and_one_way(language, criterion):
    """Also after the weights have moved, as fine-tuning moves them."""
    model, maps, before = copy.deepcopy(language.model), None, None
    errors, sparsity = [], []
    for index, shares in enumerate(SHARES, 1):
        maps, report = tier_iteration(
            model, step(index, shares), language.batches, maps, options=TierOptions(criterion=criterion)
        )
        tiers = torch.cat([tier_map.tiers.flatten() for tier_map in maps.values()])
        masks = torch.cat([get_mask(model.get_submodule(name)).flatten() for name in maps])
        if before is not None:
            assert (tiers >= before[0]).all() and not (masks & ~before[1]).any()
        before = tiers, masks
        errors.append(language.errors(model).mean().item())
        sparsity.append(report.sparsity)
        with torch.no_grad():
            for name in maps:
                weight = model.get_submodule(name).weight
                weight += 0.05 * weight.std() * torch.randn_like(weight) * get_mask(model.get_submodule(name))
    assert errors == sorted(errors) and len(set(errors)) == 3
    assert sparsity == sorted(sparsity) and len(set(sparsity)) == 3
