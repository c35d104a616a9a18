"""The Triton kernel that scores the tiers of blocks, on the GPU or in Triton's interpreter."""

import pytest
import torch
from helpers import DTYPES, LAYOUTS, assert_same_sums, dtype_id, hostile, ties
from test_triton_tiers import TILINGS, pytestmark  # noqa: F401

from sparsekit.ops.tier_scores import tier_scores_reference

kernels = pytest.importorskip("sparsekit.triton_kernels.tier_scores")


def check(gpu, weight, k, block, scale, score_scale, squared):
    expected = tier_scores_reference(weight, k, *block, scale, score_scale, squared)
    on_gpu = [tensor if tensor is None else tensor.to(gpu) for tensor in (scale, score_scale)]
    scores = kernels.tier_scores(weight.to(gpu), k, *block, *on_gpu, squared).cpu()
    assert_same_sums(scores, expected)


def test_literal(gpu):
    weight = torch.tensor([[1.0, -2, 3, -4, 5, -6], [9, 1, 1, 1, 2, 2]], device=gpu)
    scores = kernels.tier_scores(weight, 3, 2, 4, None, None, False)
    assert scores.tolist() == [[[22, 15]], [[17, 15]], [[16, 13]]]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape, block", TILINGS)
def test_equal_reference(gpu, dtype, shape, block):
    weight, scale = hostile(*shape, dtype=dtype), torch.rand(shape[1])
    if dtype == torch.bfloat16:
        check(gpu, weight, 10, block, None, torch.randn(shape[1]), False)
    else:
        check(gpu, weight, 10, block, scale, scale, True)


@pytest.mark.parametrize("squared", [False, True])
def test_without_topk(gpu, squared):
    check(gpu, LAYOUTS["transposed"](ties(20, 36)), 0, (16, 16), None, None, squared)


def test_of_blocks_larger_than_the_registers(gpu, monkeypatch):
    monkeypatch.setattr(kernels, "plan_strips", lambda *args: None)
    check(gpu, hostile(9, 21), 3, (4, 8), torch.rand(21), -torch.rand(21), False)
    check(gpu, hostile(9, 21), 3, (4, 8), torch.rand(21), -torch.rand(21), True)


@pytest.mark.parametrize("shape", [(0, 16), (16, 0)])
def test_empty(gpu, shape):
    check(gpu, torch.empty(shape), 10, (16, 16), None, None, False)
