import pytest
import torch

import sparsekit as sk
from sparsekit.ops.tier_scores import tier_scores_reference
from sparsekit.ops.tiers import DENSE, SPARSE24, tier_prune_reference

from .baselines import copy_call
from .shapes import DTYPES, SQUARE, name
from .usual import block_sums, block_topk, topk_scatter

SAMPLE = slice(0, 512)  # rows: whole blocks


def usual_tiers(weight, tiers, scale):
    """Prunes blocks by tiers as it is usually written; returns the weight, its mask and the scores of blocks."""
    tier = tiers.repeat_interleave(16, 0).repeat_interleave(16, 1)
    mask = torch.where(tier == SPARSE24, topk_scatter(weight, 2, 4), block_topk(weight, 10)) | (tier == DENSE)
    pruned = weight * mask
    return pruned, mask, block_sums(pruned, scale)


@pytest.mark.parametrize("dtype", DTYPES)
def bench_tier_prune(record, dtype):
    weight, scale = torch.randn(SQUARE).to(DTYPES[dtype]), torch.rand(SQUARE[1])
    tiers = torch.randint(0, 3, (SQUARE[0] // 16, SQUARE[1] // 16), dtype=torch.uint8)
    outputs = sk.tier_prune(weight, tiers, 10, score_scale=scale)
    expected = tier_prune_reference(weight[SAMPLE], tiers[: SAMPLE.stop // 16], 10, 16, 16, None, scale)
    for got, want in zip(outputs, expected, strict=True):
        assert torch.equal(got[: len(want)], want)
    baselines, copied = copy_call(weight)
    baselines["topk"] = lambda: usual_tiers(weight, tiers, scale)
    row = {"op": "tier_prune 16x16", "shape": name(SQUARE), "dtype": dtype, "goal": {}}
    moved = weight.nbytes + sum(part.nbytes for part in outputs)
    record(
        row, lambda: sk.tier_prune(weight, tiers, 10, score_scale=scale), baselines, bytes_moved=moved, copied=copied
    )


def usual_scores(weight, scale):
    """Returns how much of its squared score every block keeps in each tier, as it is usually written."""
    score = weight * scale
    squares, one = score.square(), torch.ones_like(scale)
    kept = squares, squares * topk_scatter(score, 2, 4), squares * block_topk(score, 10)
    return torch.stack([block_sums(part, one) for part in kept])


@pytest.mark.parametrize("dtype", DTYPES)
def bench_tier_scores(record, dtype):
    weight, scale = torch.randn(SQUARE).to(DTYPES[dtype]), torch.rand(SQUARE[1])

    def own():
        return sk.tier_scores(weight, 10, scale=scale, score_scale=scale, squared=True)

    expected = tier_scores_reference(weight[SAMPLE], 10, 16, 16, scale, scale, True)
    assert torch.equal(own()[:, : SAMPLE.stop // 16], expected)
    baselines, copied = copy_call(weight)
    baselines["topk"] = lambda: usual_scores(weight, scale)
    row = {"op": "tier_scores 16x16", "shape": name(SQUARE), "dtype": dtype, "goal": {}}
    record(row, own, baselines, bytes_moved=weight.nbytes + own().nbytes, copied=copied)
