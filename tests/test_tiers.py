import pytest
import torch
from helpers import DTYPES, LAYOUTS, assert_same, assert_same_sums, dtype_id, hostile, opcheck, poison, shape_id, ties
from hypothesis import given
from hypothesis import strategies as st
from tiering import random_tiers

import sparsekit as sk
from sparsekit.ops.tiers import tier_prune_reference

OPS = torch.ops.sparsekit
BLOCKS = [(16, 16), (4, 4), (1, 8), (5, 12), (16, 32), (40, 64)]
SHAPES = [(0, 16), (16, 0), (1, 1), (5, 3), (16, 16), (17, 33), (48, 80), (33, 262)]


def assert_all_same(actual, expected):
    for got, want in zip(actual[:2], expected[:2], strict=True):
        assert_same(got, want)
    assert_same_sums(actual[2], expected[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_literal(simd, dtype):
    row = [1, -2, 3, -4]
    weight = torch.tensor([row * 3 + [8], row * 3 + [9]], dtype=dtype)
    tiers = torch.tensor([[0, 1, 2, 1]], dtype=torch.uint8)
    pruned, mask, scores = sk.tier_prune(weight, tiers, 3, (2, 4))
    assert pruned.tolist() == [[1, -2, 3, -4, 0, 0, 3, -4, 0, 0, 3, -4, 8], [1, -2, 3, -4, 0, 0, 3, -4, 0, 0, 0, -4, 9]]
    assert torch.equal(mask, pruned != 0)
    assert scores.tolist() == [[20, 14, 11, 17]]
    scale, score_scale = torch.tensor([9.0, 1, 1, 1] * 3 + [1]), torch.tensor([2.0, 1, 1, 1] * 3 + [0])
    pruned, mask, scores = sk.tier_prune(weight, tiers, 3, (2, 4), scale=scale, score_scale=score_scale)
    assert pruned.tolist() == [[1, -2, 3, -4, 1, 0, 0, -4, 1, 0, 0, -4, 8], [1, -2, 3, -4, 1, 0, 0, -4, 1, 0, 0, 0, 9]]
    assert torch.equal(mask, pruned != 0)
    assert scores.tolist() == [[22, 12, 8, 0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("block", BLOCKS, ids=shape_id)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_every_level_equals_reference(simd, dtype, block, shape):
    size = block[0] * block[1]
    for weight in (ties(*shape, dtype=dtype), hostile(*shape, dtype=dtype)):
        tiers = random_tiers(weight.shape, block)
        for k in (0, size // 25 + 1, size):
            scaled = (None, None, False), (torch.rand(shape[1]), None, True), (None, hostile(shape[1]), True)
            for scale, score_scale, nested in scaled:
                expected = tier_prune_reference(weight, tiers, k, *block, scale, score_scale, nested)
                poison(*expected, *expected)
                actual = sk.tier_prune(weight, tiers, k, block, scale=scale, score_scale=score_scale, nested=nested)
                assert_all_same(actual, expected)


def test_nested_literal(simd):
    weight = torch.tensor([[9.0, -8, 7, 6, 1, 0, 0, 0], [1, 1, 1, 1, 5, 5, 5, 5]])
    tiers = torch.tensor([[2, 2]], dtype=torch.uint8)
    assert sk.tier_prune(weight, tiers, 3, (2, 4))[0].tolist() == [[9, -8, 7, 0, 0, 0, 0, 0], [0, 0, 0, 0, 5, 5, 5, 0]]
    pruned, mask, scores = sk.tier_prune(weight, tiers, 3, (2, 4), nested=True)
    assert pruned.tolist() == [[9, -8, 0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 5, 5, 0, 0]]
    assert torch.equal(mask, pruned != 0) and scores.tolist() == [[18, 11]]


@pytest.mark.parametrize("k", [3, 200])
def test_nested_prunes_as_two_steps_do(simd, k):
    weight, tiers = ties(70, 90), torch.randint(0, 3, (5, 6), dtype=torch.uint8)
    twice = sk.tier_prune(sk.tier_prune(weight, tiers.clamp(max=1), k)[0], tiers, k)[0]
    assert torch.equal(sk.tier_prune(weight, tiers, k, nested=True)[0], twice)


@pytest.mark.parametrize("tier", [0, 1, 2, 3, 255])
def test_one_tier(simd, tier):
    weight, score_scale = hostile(35, 134), torch.rand(134)
    pruned, mask, scores = sk.tier_prune(
        weight, random_tiers(weight.shape, (16, 16), 1) + tier, 10, score_scale=score_scale
    )
    if tier == 0:
        expected = torch.ones_like(mask)
    else:
        expected = sk.nm_mask(weight, 2, 4) if tier == 1 else sk.block_topk_mask(weight, 10)
    assert_same(mask, expected)
    assert_same(pruned, torch.where(expected, weight, 0))
    assert torch.equal(
        scores.nan_to_num(nan=-1), sk.block_scores(weight, scale=score_scale, mask=mask).nan_to_num(nan=-1)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(simd, layout, dtype):
    weight, tiers = hostile(34, 70, dtype=dtype), torch.randint(0, 3, (3, 5), dtype=torch.uint8)
    scale = torch.rand(70)
    expected = tier_prune_reference(weight, tiers, 10, 16, 16, scale, scale)
    strided = torch.stack([scale, scale.neg()], 1)[:, 0]
    actual = sk.tier_prune(LAYOUTS[layout](weight), LAYOUTS[layout](tiers), 10, scale=strided, score_scale=strided)
    assert_all_same(actual, expected)


@pytest.mark.parametrize("cols", [1024, 1030])
def test_large_and_threads(simd, threads, cols):
    weight, score_scale = torch.randn(2100, cols), torch.rand(cols)
    tiers = random_tiers(weight.shape, (16, 16), 3)
    expected = tier_prune_reference(weight, tiers, 10, 16, 16, None, score_scale)
    for count in (1, 2):
        threads(count)
        assert_all_same(sk.tier_prune(weight, tiers, 10, score_scale=score_scale), expected)


@given(
    rows=st.integers(1, 40), cols=st.integers(1, 90), tall=st.integers(1, 20), quarter=st.integers(1, 9), data=st.data()
)
def test_scores_are_those_of_what_is_left(simd, rows, cols, tall, quarter, data):
    block, weight, score_scale = (tall, 4 * quarter), hostile(rows, cols), torch.rand(cols)
    k = data.draw(st.integers(0, block[0] * block[1]))
    pruned, mask, scores = sk.tier_prune(weight, random_tiers(weight.shape, block), k, block, score_scale=score_scale)
    assert_same(pruned, torch.where(mask, weight, 0))
    expected = sk.block_scores(weight, block, scale=score_scale, mask=mask)
    assert torch.equal(scores.nan_to_num(nan=-1), expected.nan_to_num(nan=-1))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_gradient(dtype):
    weight, grad = torch.randn(18, 37).to(dtype).requires_grad_(), torch.randn(18, 37).to(dtype)
    pruned, mask, scores = sk.tier_prune(weight, random_tiers(weight.shape, (16, 16), 3), 10)
    assert not mask.requires_grad and not scores.requires_grad
    pruned.backward(grad)
    assert torch.equal(weight.grad, torch.where(mask, grad, 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [(0, 4), (17, 33)], ids=shape_id)
def test_opcheck(dtype, shape):
    weight = torch.randn(shape).to(dtype)
    tiers = random_tiers(weight.shape, (16, 16), 3)
    opcheck(OPS.tier_prune.default, (weight.clone().requires_grad_(), tiers, 10, 16, 16, None, None))
    scale = torch.rand(shape[1])
    opcheck(OPS.tier_prune.default, (weight, tiers, 10, 16, 16, scale, scale, True))


def test_compile_fullgraph():
    def run(weight, tiers, scale):
        pruned, mask, scores = sk.tier_prune(weight * 2, tiers, 10, score_scale=scale)
        return pruned + 1, mask, scores * 2

    arguments = torch.randn(40, 50), torch.randint(0, 3, (3, 4), dtype=torch.uint8), torch.rand(50)
    outputs = torch.compile(run, fullgraph=True, backend="aot_eager")(*arguments)
    for got, expected in zip(outputs, run(*arguments), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"weight": torch.ones(4, 8).int()}, TypeError, r"weight must be float32, .* got torch\.int32"),
        ({"weight": torch.ones(8)}, ValueError, r"weight must have 2 dimensions, got shape \(8,\)"),
        ({"block": (4, 6)}, ValueError, r"columns of block must be a multiple of 4, got \(4, 6\)"),
        ({"block": (0, 4)}, ValueError, r"two positive sides \(rows, cols\), got \(0, 4\)"),
        ({"k": 17}, ValueError, r"k must be between 0 and 16 .* got 17"),
        ({"k": 1.0}, TypeError, r"k must be an int, got 1\.0"),
        ({"tiers": torch.ones(1, 2).bool()}, TypeError, r"tiers must be torch\.uint8, got torch\.bool"),
        ({"tiers": torch.ones(2, 1).byte()}, ValueError, r"tiers must have shape \(1, 2\), got \(2, 1\)"),
        ({"scale": torch.ones(4)}, ValueError, r"scale must have shape \(8,\), got \(4,\)"),
        ({"score_scale": torch.ones(8).half()}, TypeError, r"score_scale must be torch\.float32, got torch\.float16"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_rejects(change, error, match):
    arguments = {"weight": torch.ones(4, 8), "tiers": torch.ones(1, 2).byte(), "k": 3, "block": (4, 4)} | change
    with pytest.raises(error, match=match):
        sk.tier_prune(**arguments)
