"""What blocks would keep of their score in each tier."""

import pytest
import torch
from helpers import DTYPES, LAYOUTS, dtype_id, hostile, opcheck, ties
from hypothesis import given
from hypothesis import strategies as st

import sparsekit as sk
from sparsekit.ops.tier_scores import tier_scores_reference

OPS = torch.ops.sparsekit


def assert_same_sums(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)  # any NaN for a NaN
    assert torch.equal(actual.signbit() & ~actual.isnan(), expected.signbit() & ~expected.isnan())
    assert actual.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_literal(simd, dtype):
    weight = torch.tensor([[1, -2, 3, -4, 5, -6], [9, 1, 1, 1, 2, 2]], dtype=dtype)
    assert sk.tier_scores(weight, 3, (2, 4)).tolist() == [[[22, 15]], [[17, 15]], [[16, 13]]]
    scale, score_scale = torch.tensor([9.0, 1, 1, 1, 0, 1]), torch.tensor([2.0, 1, 1, 1, 1, -1])
    scores = sk.tier_scores(weight, 1, (2, 4), scale=scale, score_scale=score_scale)
    assert scores.tolist() == [[[32, -1]], [[25, -1]], [[18, -6]]]
    squares = sk.tier_scores(weight, 1, (2, 4), scale=scale, score_scale=score_scale, squared=True)
    assert squares.tolist() == [[[4 + 4 + 9 + 16 + 324 + 3, 69]], [[4 + 16 + 324 + 1, 69]], [[324, 36]]]


@pytest.mark.parametrize("block", [(16, 16), (5, 12), (1, 8), (40, 64)], ids=str)
@pytest.mark.parametrize("shape", [(0, 16), (16, 0), (1, 1), (5, 3), (17, 33), (48, 80), (33, 262)], ids=str)
def test_every_level_equals_reference(simd, shape, block):
    size = block[0] * block[1]
    for dtype in DTYPES:
        for weight in (ties(*shape, dtype=dtype), hostile(*shape, dtype=dtype)):
            for k, squared in ((0, False), (size // 25 + 1, True), (size, False)):
                for scales in ((None, None), (torch.rand(shape[1]), None), (None, hostile(shape[1]))):
                    expected = tier_scores_reference(weight, k, *block, *scales, squared)
                    scale, score_scale = scales
                    actual = sk.tier_scores(weight, k, block, scale=scale, score_scale=score_scale, squared=squared)
                    assert_same_sums(actual, expected)


@given(
    rows=st.integers(1, 40), cols=st.integers(1, 90), tall=st.integers(1, 20), quarter=st.integers(1, 9), data=st.data()
)
def test_the_scores_that_tier_prune_gives_with_all_blocks_in_one_tier(simd, rows, cols, tall, quarter, data):
    block, weight, scale, score_scale = (tall, 4 * quarter), hostile(rows, cols), torch.rand(cols), torch.rand(cols)
    k = data.draw(st.integers(0, block[0] * block[1]))
    scores = sk.tier_scores(weight, k, block, scale=scale, score_scale=score_scale)
    for tier in range(3):
        tiers = torch.full(scores.shape[1:], tier, dtype=torch.uint8)
        assert_same_sums(scores[tier], sk.tier_prune(weight, tiers, k, block, scale=scale, score_scale=score_scale)[2])


@pytest.mark.parametrize("cols", [1024, 1030])
def test_large_and_threads(simd, threads, cols):
    weight, scale = torch.randn(2100, cols), torch.rand(cols)
    expected = tier_scores_reference(weight, 10, 16, 16, scale, scale, True)
    for count in (1, 2):
        threads(count)
        assert_same_sums(sk.tier_scores(weight, 10, scale=scale, score_scale=scale, squared=True), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout):
    weight, scale = hostile(34, 70, dtype=torch.bfloat16), torch.rand(70)
    expected = tier_scores_reference(weight, 10, 16, 16, scale, scale, False)
    strided = torch.stack([scale, scale.neg()], 1)[:, 0]
    assert_same_sums(sk.tier_scores(LAYOUTS[layout](weight), 10, scale=strided, score_scale=strided), expected)


@pytest.mark.parametrize("shape", [(0, 4), (17, 33)], ids=str)
def test_opcheck(shape):
    weight, scale = torch.randn(shape), torch.rand(shape[1])
    opcheck(OPS.tier_scores.default, (weight, 10, 16, 16, None, None, False))
    opcheck(OPS.tier_scores.default, (weight.t(), 3, 5, 12, scale[:1].expand(shape[0]), None, True))


def test_compile_fullgraph_without_a_gradient():
    def run(weight, scale):
        return sk.tier_scores(weight * 2, 10, score_scale=scale, squared=True) + 1

    arguments = torch.randn(40, 50, requires_grad=True), torch.rand(50)
    scores = torch.compile(run, fullgraph=True, backend="aot_eager")(*arguments)
    assert torch.equal(scores, run(*arguments)) and not scores.requires_grad


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"weight": torch.ones(4, 8).int()}, TypeError, r"weight must be float32, .* got torch\.int32"),
        ({"weight": torch.ones(8)}, ValueError, r"weight must have 2 dimensions, got shape \(8,\)"),
        ({"block": (4, 6)}, ValueError, r"columns of block must be a multiple of 4, got \(4, 6\)"),
        ({"k": 17}, ValueError, r"k must be between 0 and 16 .* got 17"),
        ({"scale": torch.ones(4)}, ValueError, r"scale must have shape \(8,\), got \(4,\)"),
        ({"score_scale": torch.ones(8).half()}, TypeError, r"score_scale must be torch\.float32, got torch\.float16"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_rejects(change, error, match):
    with pytest.raises(error, match=match):
        sk.tier_scores(**{"weight": torch.ones(4, 8), "k": 3, "block": (4, 4)} | change)
