from functools import partial

import pytest
import torch

import sparsekit as sk
from sparsekit.ops.bits import pack_bits
from sparsekit.ops.nm import nm_mask_bits_reference, nm_mask_reference, nm_prune_reference

from .baselines import copy_call
from .shapes import DTYPES, SQUARE, name
from .usual import topk_prune, topk_scatter

SAMPLE = slice(None, None, 7)  # the rows that are checked: every thread has some


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["nm_mask", "nm_prune"])
@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8)], ids=lambda pattern: f"{pattern[0]}:{pattern[1]}")
def bench_nm(record, op, pattern, dtype):
    weight, scale = torch.randn(SQUARE).to(DTYPES[dtype]), torch.rand(SQUARE[1])
    if op == "nm_mask":
        call, moved = lambda: sk.nm_mask(weight, *pattern), weight.nbytes + weight.numel()
        assert torch.equal(call()[SAMPLE], nm_mask_reference(weight[SAMPLE], *pattern))
    else:
        call, moved = lambda: sk.nm_prune(weight, *pattern, scale=scale), 2 * weight.nbytes + weight.numel()
        for got, expected in zip(call(), nm_prune_reference(weight[SAMPLE], *pattern, scale), strict=True):
            assert torch.equal(got[SAMPLE], expected)
    baselines, copied = copy_call(weight)
    usual = topk_scatter if op == "nm_mask" else partial(topk_prune, scale=scale)
    baselines["topk"] = lambda: usual(weight, *pattern)
    goal = {"copy_": 0.7, "topk": 50} if pattern == (2, 4) else {}
    row = {"op": f"{op} {pattern[0]}:{pattern[1]}", "shape": name(SQUARE), "dtype": dtype, "goal": goal}
    record(row, call, baselines, bytes_moved=moved, copied=copied)


@pytest.mark.parametrize("dtype", DTYPES)
def bench_nm_mask_bits(record, dtype):
    score = torch.randn(SQUARE).to(DTYPES[dtype])
    bits = sk.nm_mask_bits(score, 2, 4)
    assert torch.equal(bits[SAMPLE], nm_mask_bits_reference(score[SAMPLE], 2, 4))
    baselines, copied = copy_call(score)
    baselines["topk"] = lambda: pack_bits(topk_scatter(score, 2, 4))
    goal = {"copy_": 0.7, "topk": 50}
    row = {"op": "nm_mask_bits 2:4", "shape": name(SQUARE), "dtype": dtype, "goal": goal}
    moved = score.nbytes + bits.nbytes
    record(row, lambda: sk.nm_mask_bits(score, 2, 4), baselines, bytes_moved=moved, copied=copied)
