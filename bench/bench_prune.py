"""Whole steps of pruning, against the loops of the published code."""

from dataclasses import dataclass

import pytest
import torch

import sparsekit as sk
from sparsekit.tiers import TierMap, demote, prune_tiers

from .loops import sparsegpt_by_columns, tiers_by_blocks, wanda_by_groups
from .shapes import MODEL, SPARSEGPT, SQUARE, name
from .usual import topk_prune

STAGES = 12  # of the model; the loops prune one of them
SHARE = 16  # the loop over blocks visits every sixteenth row of them
SCHEDULE = ((0.9, 0.1, 0.0), (0.8, 0.1, 0.1))


@dataclass
class Norm:
    norm: torch.Tensor


@dataclass
class Moments:
    matrix: torch.Tensor


def bench_prune_wanda(record):
    layers = [(torch.randn(shape), torch.rand(shape[1])) for _ in range(STAGES) for shape in MODEL]
    method = sk.Wanda("2:4")

    def prune():
        for weight, norm in layers:
            method.prune(weight, Norm(norm))

    def loop(usual):
        for weight, norm in layers[: len(MODEL)]:
            usual(weight, norm)

    for weight, norm in layers[: len(MODEL)]:
        for got, expected in zip(method.prune(weight, Norm(norm)), wanda_by_groups(weight, norm), strict=True):
            assert torch.equal(got, expected)
    baselines = {
        "topk": lambda: loop(lambda weight, norm: topk_prune(weight, 2, 4, norm)),
        "group loop": lambda: loop(wanda_by_groups),
    }
    shares = dict.fromkeys(baselines, 1 / STAGES)
    row = {"step": "Wanda 2:4, all layers", "shape": f"{STAGES} stages of 768/3072"}
    record(row | {"goal": {"topk": 15, "group loop": 50}}, prune, baselines, shares=shares)


@pytest.mark.parametrize("criterion", ["published", "loss"])
def bench_prune_tiers(record, criterion):
    weight, norm = torch.randn(SQUARE), torch.rand(SQUARE[1]) + 0.5

    def iterate(weight, norm, tier_map, target, criterion=criterion):
        tier_map, _ = demote(weight, norm, tier_map, target, criterion=criterion)
        return prune_tiers(weight, norm, tier_map, criterion)[0], tier_map

    weight, tier_map = iterate(weight, norm, TierMap.dense(weight), SCHEDULE[0])
    part = weight[: SQUARE[0] // SHARE]
    part, tiers = iterate(part, norm, TierMap.dense(part), SCHEDULE[0], "published")
    got = iterate(part, norm, tiers, SCHEDULE[1], "published")
    pruned, expected = tiers_by_blocks(part, norm, tiers.tiers, SCHEDULE[1], tiers.k)
    assert torch.equal(got[0], pruned) and torch.equal(got[1].tiers, expected)
    own, reached = iterate(part, norm, tiers, SCHEDULE[1])
    assert criterion == "published" or torch.equal(own, sk.tier_prune(part, reached.tiers, tiers.k, scale=norm)[0])
    baselines = {"block loop": lambda: tiers_by_blocks(part, norm, tiers.tiers, SCHEDULE[1], tiers.k)}
    row = {"step": f"tier iteration, {criterion!r}", "shape": name(SQUARE), "goal": {"block loop": 100}}
    record(row, lambda: iterate(weight, norm, tier_map, SCHEDULE[1]), baselines, shares={"block loop": 1 / SHARE})


@pytest.mark.parametrize("shape", SPARSEGPT, ids=name)
def bench_prune_sparsegpt(record, shape):
    weight, x = torch.randn(shape), torch.randn(2 * shape[1], shape[1]) * torch.rand(shape[1])
    gram, method = x.t() @ x / len(x), sk.SparseGPT("2:4")
    (got, mask), (expected, kept) = method.prune(weight, Moments(gram)), sparsegpt_by_columns(weight, gram)
    # Where rounding decides between two weights, the rest of a row differs.
    assert (mask == kept).float().mean() > 0.999
    same = (mask == kept).all(1)
    torch.testing.assert_close(got[same], expected[same], rtol=1e-3, atol=1e-3)
    baselines = {"column loop": lambda: sparsegpt_by_columns(weight, gram)}
    row = {"step": "SparseGPT 2:4", "shape": name(shape), "goal": {"column loop": 5}}
    record(row, lambda: method.prune(weight, Moments(gram)), baselines, shares={})
