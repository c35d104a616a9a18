import math

import pytest
import torch
from helpers import (
    DTYPES,
    LAYOUTS,
    assert_same,
    assert_same_sums,
    dtype_id,
    hostile,
    magnitude_order,
    opcheck,
    poison,
    shape_id,
    ties,
)
from hypothesis import given
from hypothesis import strategies as st

import sparsekit as sk
from sparsekit.ops.blocks import block_scores_reference, block_topk_mask_reference

OPS = torch.ops.sparsekit
NAN, BIG = float("nan"), 2.0**24  # BIG + 1 rounds to BIG
BLOCKS = [(16, 16), (1, 1), (1, 7), (4, 8), (3, 5), (32, 32), (16, 1), (64, 16), (1, 64)]
SHAPES = [(0, 16), (16, 0), (1, 1), (5, 3), (16, 16), (17, 33), (48, 80), (100, 130), (33, 260)]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_scores_literal(simd, dtype):
    weight = torch.tensor([[1, -2, 3, 4, 1], [5, 6, -7, 8, 1], [1, 1, 1, 1, -1]], dtype=dtype)
    assert sk.block_scores(weight, (2, 2)).tolist() == [[14, 22, 2], [2, 2, 1]]
    scale = torch.tensor([1, 0, 0.5, 2, 3])
    assert sk.block_scores(weight, (2, 2), scale=scale).tolist() == [[6, 29, 6], [1, 2.5, 3]]
    mask = weight > 1
    assert sk.block_scores(weight, (2, 2), mask=mask).tolist() == [[11, 15, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    "column, total", [([1, 1, BIG], BIG + 2), ([BIG, 1, 1], BIG), ([1, BIG, 1], BIG)], ids=["up", "down", "middle"]
)
def test_rows_add_in_order(simd, column, total):
    weight = torch.tensor(column).unsqueeze(1)
    assert sk.block_scores(weight, (3, 1)).item() == total


@pytest.mark.parametrize("row", [[BIG, 1, 0, 1], [1, BIG, 1]], ids=["four", "three-as-four"])
def test_columns_add_by_halves(simd, row):
    assert sk.block_scores(torch.tensor([row]), (1, len(row))).item() == BIG + 2  # from left to right: BIG


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("block", BLOCKS, ids=shape_id)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_every_level_equals_reference(simd, dtype, block, shape):
    for weight in (torch.randn(shape).to(dtype), hostile(*shape, dtype=dtype)):
        scale, mask = torch.rand(shape[1]), torch.rand(shape) < 0.5
        for given_scale in (None, scale):
            for given_mask in (None, mask):
                expected = block_scores_reference(weight, *block, given_scale, given_mask)
                poison(expected, expected)
                assert_same_sums(sk.block_scores(weight, block, scale=given_scale, mask=given_mask), expected)
        for k in {0, 1, math.prod(block) // 3, math.prod(block)}:
            kept = block_topk_mask_reference(weight, k, *block)
            poison(kept, kept)
            assert_same(sk.block_topk_mask(weight, k, block), kept)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_any_strides(simd, layout, dtype):
    base, scale, keep = ties(37, 52, dtype=dtype), torch.rand(52), torch.rand(37, 52) < 0.5
    weight, mask = LAYOUTS[layout](base), LAYOUTS[layout](keep)
    assert_same_sums(sk.block_scores(weight, scale=scale, mask=mask), block_scores_reference(base, 16, 16, scale, keep))
    assert_same(sk.block_topk_mask(weight, 10), block_topk_mask_reference(base, 10, 16, 16))


@pytest.mark.parametrize("scale", [hostile(40), torch.zeros(40), -torch.rand(40)], ids=["hostile", "zero", "negative"])
def test_any_scale(simd, scale):
    weight = hostile(20, 40)
    assert_same_sums(sk.block_scores(weight, scale=scale), block_scores_reference(weight, 16, 16, scale, None))


def test_masked_nan_does_not_count(simd):
    weight = torch.tensor([[1.0, NAN], [2.0, float("inf")]])
    assert sk.block_scores(weight, (2, 2), mask=torch.tensor([[True, False], [True, False]])).item() == 3


def test_large_and_threads(simd, threads):
    weight, scale = torch.randn(1030, 1034), torch.rand(1034)
    scores = block_scores_reference(weight, 16, 16, scale, None)
    kept = block_topk_mask_reference(weight, 10, 16, 16)
    for count in (1, 2):
        threads(count)
        assert_same_sums(sk.block_scores(weight, scale=scale), scores)
        assert_same(sk.block_topk_mask(weight, 10), kept)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    "score, k, block, kept",
    [
        ([[1, -4, 9, 2], [3, 2, 2, -2]], 2, (2, 2), [".xxx", "x..."]),
        ([[5, 5], [5, 5]], 3, (2, 2), ["xx", "x."]),
        ([[0.0, -0.0, NAN, float("inf")]], 1, (1, 4), ["..x."]),
        ([[1, 2, 3], [4, 5, 6], [7, 8, 9]], 1, (2, 2), ["...", ".xx", ".xx"]),
        ([[3, 1, 2, 9, 4]], 2, (1, 5), ["...xx"]),
    ],
    ids=["magnitude", "ties", "nan", "edges", "per-row"],
)
def test_topk_literal(simd, dtype, score, k, block, kept):
    expected = torch.tensor([[char == "x" for char in row] for row in kept])
    assert_same(sk.block_topk_mask(torch.tensor(score, dtype=dtype), k, block), expected)


sides = st.integers(1, 9)
floats = st.one_of(st.integers(-2, 2).map(float), st.floats(width=32))


@given(rows=sides, cols=sides, block=st.tuples(sides, sides), data=st.data())
def test_topk_is_exact_in_every_block(simd, rows, cols, block, data):
    k = data.draw(st.integers(0, math.prod(block)))
    score = torch.tensor(data.draw(st.lists(floats, min_size=rows * cols, max_size=rows * cols))).view(rows, cols)
    mask = sk.block_topk_mask(score, k, block)
    for top in range(0, rows, block[0]):
        for left in range(0, cols, block[1]):
            window = slice(top, top + block[0]), slice(left, left + block[1])
            best = magnitude_order(score[window].flatten().tolist())[:k]
            assert mask[window].flatten().nonzero().flatten().tolist() == sorted(best)


@given(rows=sides, cols=sides, block=st.tuples(sides, sides), data=st.data())
def test_scores_are_sums(simd, rows, cols, block, data):
    entries = st.lists(st.floats(-1e6, 1e6, width=32), min_size=rows * cols, max_size=rows * cols)
    weight = torch.tensor(data.draw(entries)).view(rows, cols)
    scores = sk.block_scores(weight, block)
    for row, scores_of_row in enumerate(scores.tolist()):
        for col, score in enumerate(scores_of_row):
            window = weight[row * block[0] : (row + 1) * block[0], col * block[1] : (col + 1) * block[1]]
            exact = math.fsum(window.abs().flatten().tolist())
            assert abs(score - exact) <= 1e-6 * window.numel() * exact


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [(0, 4), (17, 33)], ids=shape_id)
def test_opcheck(dtype, shape):
    weight, mask = torch.randn(shape).to(dtype), torch.rand(shape) < 0.5
    opcheck(OPS.block_scores.default, (weight, 16, 16, None, None))
    opcheck(OPS.block_scores.default, (weight.t(), 3, 5, torch.rand(shape[0]), mask.t()))
    opcheck(OPS.block_topk_mask.default, (weight, 10, 16, 16))


def test_compile_fullgraph():
    def run(weight, scale, mask):
        scores = sk.block_scores(weight + 0, scale=scale, mask=mask)
        return scores * 2, sk.block_topk_mask(weight, 10), sk.block_topk_mask(scores, 1, (1, 2))

    arguments = torch.randn(40, 50), torch.rand(50), torch.rand(40, 50) < 0.5
    outputs = torch.compile(run, fullgraph=True, backend="aot_eager")(*arguments)
    for got, expected in zip(outputs, run(*arguments), strict=True):
        assert torch.equal(got, expected)


def test_scores_have_no_gradient():
    assert not sk.block_scores(torch.randn(4, 4, requires_grad=True)).requires_grad


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda w: sk.block_scores(w.int()), TypeError, r"weight must be float32, .* got torch\.int32"),
        (lambda w: sk.block_scores(w[0]), ValueError, r"weight must have 2 dimensions, got shape \(6,\)"),
        (lambda w: sk.block_scores(w, (0, 16)), ValueError, r"two positive sides \(rows, cols\), got \(0, 16\)"),
        (lambda w: sk.block_scores(w, (16,)), ValueError, r"two positive sides \(rows, cols\), got \(16,\)"),
        (lambda w: sk.block_scores(w, 16), TypeError, r"block must be two ints \(rows, cols\), got 16"),
        (lambda w: sk.block_scores(w, (2.5, 2)), TypeError, r"block must be two ints \(rows, cols\), got \(2\.5, 2\)"),
        (lambda w: sk.block_topk_mask(w, 1.5), TypeError, r"k must be an int, got 1\.5"),
        (lambda w: sk.block_scores(w, scale=torch.ones(4)), ValueError, r"scale must have shape \(6,\), got \(4,\)"),
        (lambda w: sk.block_scores(w, scale=torch.ones(6).half()), TypeError, r"scale must be torch\.float32"),
        (
            lambda w: sk.block_scores(w, mask=torch.ones(4, 6)),
            TypeError,
            r"mask must be torch\.bool, got torch\.float32",
        ),
        (lambda w: sk.block_scores(w, mask=w.t() > 0), ValueError, r"mask must have shape \(4, 6\), got \(6, 4\)"),
        (lambda w: sk.block_scores(w, mask=(w > 0).to("meta")), ValueError, r"mask must be on cpu, got meta"),
        (lambda w: sk.block_topk_mask(w.double(), 1), TypeError, r"score must be float32, .* got torch\.float64"),
        (lambda w: sk.block_topk_mask(w[None], 1), ValueError, r"score must have 2 dimensions, got shape \(1, 4, 6\)"),
        (lambda w: sk.block_topk_mask(w, -1), ValueError, r"k must be between 0 and 256 .* got -1"),
        (lambda w: sk.block_topk_mask(w, 7, (2, 3)), ValueError, r"k must be between 0 and 6 .*\(2, 3\), got 7"),
        (lambda w: sk.block_topk_mask(w, 1, (2, -3)), ValueError, r"two positive sides .* got \(2, -3\)"),
    ],
)
def test_rejects(call, error, match):
    with pytest.raises(error, match=match):
        call(torch.ones(4, 6))
