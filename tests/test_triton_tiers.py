"""The Triton kernels that prune blocks by their tiers, on the GPU or in Triton's interpreter."""

import pytest
import torch
from helpers import DTYPES, LAYOUTS, assert_same, assert_same_sums, dtype_id, hostile, poison, ties
from tiering import random_tiers

from sparsekit.ops.tiers import tier_prune_reference

tiers = pytest.importorskip("sparsekit.triton_kernels.tiers")

pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # the interpreter adds with numpy
]
# Whole blocks; a tail of two; several slices of a row; several rows of a slice; a tail of three and odd sides.
TILINGS = [((16, 48), (16, 16)), ((17, 38), (16, 8)), ((2, 70), (2, 64)), ((30, 30), (32, 8)), ((3, 27), (3, 12))]


def check(gpu, weight, tier, k, block, scale=None, score_scale=None, nested=False):
    expected = tier_prune_reference(weight, tier, k, *block, scale, score_scale, nested)
    poison(*expected)
    on_gpu = [tensor if tensor is None else tensor.to(gpu) for tensor in (scale, score_scale)]
    outputs = tiers.tier_prune(weight.to(gpu), tier.to(gpu), k, *block, *on_gpu, nested)
    pruned, mask, scores = (each.cpu() for each in outputs)
    assert_same(mask, expected[1])
    assert_same(pruned, expected[0])
    assert_same_sums(scores, expected[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_literal(gpu, dtype):
    weight = torch.tensor([[1, -2, 3, 4, 0, 1, 9, 2, -5, 6, 7, 8, 3]], dtype=dtype, device=gpu)
    tier = torch.tensor([[0, 1, 2, 1]], dtype=torch.uint8, device=gpu)
    pruned, mask, scores = tiers.tier_prune(weight, tier, 1, 1, 4, None, None)
    assert pruned.tolist() == [[1, -2, 3, 4, 0, 0, 9, 2, 0, 0, 0, 8, 3]]
    assert mask.int().tolist() == [[1, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0, 1, 1]]
    assert scores.tolist() == [[10, 11, 8, 3]]
    scale = torch.tensor([1.0, 1, 1, 1, 9, 9, 0, 0, 9, 0, 0, 0, 1], device=gpu)
    pruned, _, scores = tiers.tier_prune(weight, tier, 1, 1, 4, scale, 2 * scale)
    assert pruned.tolist() == [[1, -2, 3, 4, 0, 1, 0, 0, -5, 0, 0, 0, 3]]
    assert scores.tolist() == [[20, 18, 90, 6]]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape, block", TILINGS)
def test_equals_reference(gpu, dtype, shape, block):
    weight, tier = hostile(*shape, dtype=dtype), random_tiers(shape, block)
    scale = None if dtype == torch.bfloat16 else torch.rand(shape[1])
    check(gpu, weight, tier, 10, block, scale, torch.randn(shape[1]))


@pytest.mark.parametrize("k", [3, 60])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_nested(gpu, dtype, k):
    tier = random_tiers((17, 22), (8, 8))
    check(gpu, ties(17, 22, dtype=dtype), tier, k, (8, 8), None if k == 3 else torch.rand(22), nested=True)


@pytest.mark.parametrize("scale", [hostile(20), -torch.rand(20)], ids=["hostile", "negative"])
def test_any_scale(gpu, scale):
    check(gpu, hostile(16, 20), random_tiers((16, 20), (8, 8)), 5, (8, 8), scale, scale)


def test_a_sum_of_negative_zeros(gpu):
    if gpu.type == "cpu":
        pytest.skip("the interpreter sums with numpy, which begins with 0")
    check(gpu, torch.zeros(16, 32), torch.tensor([[0, 2]], dtype=torch.uint8), 256, (16, 16), None, -torch.ones(32))


@pytest.mark.parametrize("tier", [0, 1, 2, 255])
def test_one_tier(gpu, tier):
    weight = ties(8, 24, dtype=torch.bfloat16)
    check(gpu, weight, torch.full((1, 3), tier, dtype=torch.uint8), 7, (8, 8))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_any_strides(gpu, layout, dtype):
    weight, tier = LAYOUTS[layout](ties(20, 36, dtype=dtype)), LAYOUTS[layout](random_tiers((20, 36), (16, 16)))
    check(gpu, weight, tier, 10, (16, 16))


def test_blocks_larger_than_the_registers(gpu, monkeypatch):
    monkeypatch.setattr(tiers, "plan_strips", lambda *args: None)
    check(gpu, hostile(9, 21), random_tiers((9, 21), (4, 8)), 3, (4, 8), torch.rand(21), torch.rand(21))
    check(gpu, ties(9, 21), random_tiers((9, 21), (4, 8)), 3, (4, 8), nested=True)


@pytest.mark.parametrize("config", tiers.TIERS.configs)
def test_every_configuration(gpu, config):
    with tiers.TIERS.force(config):
        check(gpu, torch.randn(16, 272).bfloat16(), random_tiers((16, 272), (16, 16)), 10, (16, 16))


@pytest.mark.parametrize("shape", [(0, 16), (16, 0)])
def test_empty(gpu, shape):
    check(gpu, torch.empty(shape), random_tiers(shape, (16, 16)), 10, (16, 16))
