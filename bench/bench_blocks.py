import pytest
import torch

import sparsekit as sk
from sparsekit.ops.blocks import block_scores_reference, block_topk_mask_reference

from .baselines import copy_call
from .shapes import DTYPES, SQUARE, name
from .usual import block_sums, block_topk

SAMPLE = slice(0, 512)  # rows: whole blocks


@pytest.mark.parametrize("dtype", DTYPES)
def bench_block_scores(record, dtype):
    weight, scale = torch.randn(SQUARE).to(DTYPES[dtype]), torch.rand(SQUARE[1])
    expected = block_scores_reference(weight, 16, 16, scale, None)
    assert torch.equal(sk.block_scores(weight, scale=scale), expected)
    baselines, copied = copy_call(weight)
    baselines["reshape"] = lambda: block_sums(weight, scale)
    row = {"op": "block_scores 16x16", "shape": name(SQUARE), "dtype": dtype, "goal": {"copy_": 0.7}}
    moved = weight.nbytes + expected.nbytes
    record(row, lambda: sk.block_scores(weight, scale=scale), baselines, bytes_moved=moved, copied=copied)


@pytest.mark.parametrize("dtype", DTYPES)
def bench_block_topk(record, dtype):
    score = torch.randn(SQUARE).to(DTYPES[dtype])
    assert torch.equal(sk.block_topk_mask(score, 10)[SAMPLE], block_topk_mask_reference(score[SAMPLE], 10, 16, 16))
    baselines, copied = copy_call(score)
    baselines["topk"] = lambda: block_topk(score, 10)
    row = {"op": "block_topk_mask 10 of 256", "shape": name(SQUARE), "dtype": dtype, "goal": {"topk": 50}}
    moved = score.nbytes + score.numel()
    record(row, lambda: sk.block_topk_mask(score, 10), baselines, bytes_moved=moved, copied=copied)
