import pytest
import torch
from helpers import (
    DTYPES,
    LAYOUTS,
    assert_same,
    dtype_id,
    hostile,
    magnitude_order,
    opcheck,
    pattern_id,
    poison,
    shape_id,
    ties,
)
from hypothesis import given
from hypothesis import strategies as st

import sparsekit as sk
from sparsekit.ops.nm import nm_mask_reference, nm_prune_reference

INF, NAN = float("inf"), float("nan")
OPS = torch.ops.sparsekit
PATTERNS = [(2, 4), (1, 4), (4, 8), (1, 1), (1, 2), (3, 4), (4, 4), (2, 5), (7, 8), (3, 7), (8, 16), (16, 32), (31, 32)]
SHAPES = [
    (0,),
    (1,),
    (3,),
    (4,),
    (37,),
    (3, 0),
    (0, 8),
    (1, 1),
    (7, 33),
    (2, 3, 5),
    (2, 3, 2, 12),
    (5, 1031),
    (64, 256),
]


def bools(text):
    return torch.tensor([char == "x" for char in text.replace(" ", "")])


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    "score, n, m, kept",
    [
        ([1, -4, 3, 2], 2, 4, ".xx."),
        ([5, 5, 5, 5], 2, 4, "xx.."),
        ([0.0, -0.0, 0.0, -0.0], 1, 4, "x..."),
        ([INF, NAN, 1, NAN], 2, 4, ".x.x"),
        ([NAN, -INF, NAN, NAN], 2, 4, "x.x."),
        ([1, 2, 3, 4, 9, 0, -7], 2, 4, "..xx xxx"),
        ([1, 2, 3], 2, 4, "xxx"),
        ([8, 7, 6, 5, 4, 3, 2, 1], 4, 8, "xxxx ...."),
        ([1, 2, 3, 3, 2, 1], 2, 3, ".xx xx."),
    ],
    ids=["magnitude", "ties", "zeros", "nan-above-inf", "nans-equal", "tail-kept", "only-tail", "4of8", "2of3"],
)
def test_mask_literal(simd, dtype, score, n, m, kept):
    assert_same(sk.nm_mask(torch.tensor(score, dtype=dtype), n, m), bools(kept))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_prune_literal(simd, dtype):
    weight = torch.tensor([[1, -2, 3, 4], [-4, 3, 2, 1]], dtype=dtype)
    scale = torch.tensor([10, 1, 1, 0.25])
    pruned, mask = sk.nm_prune(weight, 2, 4, scale=scale)
    assert pruned.tolist() == [[1, 0, 3, 0], [-4, 3, 0, 0]]
    assert mask.tolist() == [[True, False, True, False], [True, True, False, False]]
    assert torch.equal(sk.nm_prune_(weight, 2, 4, scale=scale), mask)
    assert torch.equal(weight, pruned)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("pattern", PATTERNS, ids=pattern_id)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_every_level_equals_reference(simd, dtype, pattern, shape):
    weight = hostile(*shape, dtype=dtype)
    mask, (pruned, _) = nm_mask_reference(weight, *pattern), nm_prune_reference(weight, *pattern, None)
    poison(mask, pruned, mask, pruned)
    assert_same(sk.nm_mask(weight, *pattern), mask)
    for got, expected in zip(sk.nm_prune(weight, *pattern), (pruned, mask), strict=True):
        assert_same(got, expected)
    assert_same(sk.nm_prune_(weight, *pattern), mask)
    assert_same(weight, pruned)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8), (3, 7)], ids=pattern_id)
@pytest.mark.parametrize("cols", [1, 4, 31, 64, 259])
def test_scale(simd, dtype, pattern, cols):
    weight = hostile(9, cols, dtype=dtype)
    for scale in (torch.rand(cols), hostile(cols), torch.zeros(cols), torch.full((cols,), INF), -torch.rand(cols)):
        pruned, mask = nm_prune_reference(weight, *pattern, scale)
        for got, expected in zip(sk.nm_prune(weight, *pattern, scale=scale), (pruned, mask), strict=True):
            assert_same(got, expected)
        strided_scale = torch.stack([scale, scale.neg()], 1)[:, 0]
        assert_same(sk.nm_prune(weight, *pattern, scale=strided_scale)[1], mask)
        copy = weight.clone()
        assert_same(sk.nm_prune_(copy, *pattern, scale=scale), mask)
        assert_same(copy, pruned)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (3, 5)], ids=pattern_id)
@pytest.mark.parametrize("shape", [(1,), (35,), (6, 36), (4, 3, 21), (2, 3, 4, 19)], ids=shape_id)
def test_any_strides(simd, layout, pattern, shape):
    base = ties(*shape)
    weight = LAYOUTS[layout](base)
    assert torch.equal(weight, base)
    pruned, mask = nm_prune_reference(base, *pattern, None)
    assert_same(sk.nm_mask(weight, *pattern), mask)
    assert_same(sk.nm_prune(weight, *pattern)[0], pruned)
    assert_same(sk.nm_prune_(weight, *pattern), mask)
    assert_same(weight.contiguous(), pruned)


def test_prune_in_place_leaves_the_neighbors(simd):
    larger = torch.randn(6, 40)
    before, window = larger.clone(), (slice(1, 4), slice(3, 35))
    sk.nm_prune_(larger[window], 2, 4)
    assert torch.equal(larger[window], sk.nm_prune(before[window], 2, 4)[0])
    larger[window] = before[window]
    assert torch.equal(larger, before)


def test_expanded_input(simd):
    row = torch.randn(32)
    assert_same(sk.nm_mask(row.expand(5, 32), 2, 4), nm_mask_reference(row, 2, 4).expand(5, 32))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_large_and_threads(simd, threads, dtype):
    weight, scale = torch.randn(1031, 1028).to(dtype), torch.rand(1028)
    expected = nm_prune_reference(weight, 2, 4, scale)
    for count in (1, 2):
        threads(count)
        for got, want in zip(sk.nm_prune(weight, 2, 4, scale=scale), expected, strict=True):
            assert_same(got, want)


floats = st.one_of(st.integers(-2, 2).map(float), st.floats(width=32))


@given(values=st.lists(floats, max_size=70), m=st.integers(1, 32), data=st.data())
def test_keeps_what_the_docstring_says(simd, values, m, data):
    n = data.draw(st.integers(1, m))
    kept = sk.nm_mask(torch.tensor(values), n, m).tolist()
    full = len(values) // m * m
    for start in range(0, full, m):
        best = magnitude_order(values[start : start + m])[:n]
        assert [i for i in range(m) if kept[start + i]] == sorted(best)
    assert all(kept[full:])


@given(values=st.lists(floats, max_size=70), m=st.integers(1, 32), data=st.data())
def test_prune_is_idempotent(simd, values, m, data):
    n = data.draw(st.integers(1, m))
    pruned, mask = sk.nm_prune(torch.tensor(values), n, m)
    again, same = sk.nm_prune(pruned, n, m)
    assert_same(again, pruned)
    assert_same(same, mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("scaled", [False, True], ids=["magnitude", "scaled"])
def test_gradient(dtype, scaled):
    weight, grad = torch.randn(6, 37).to(dtype), torch.randn(6, 37).to(dtype)
    scale = torch.rand(37) if scaled else None
    mine, theirs = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    pruned, mask = sk.nm_prune(mine, 2, 4, scale=scale)
    assert not mask.requires_grad
    pruned.backward(grad)
    nm_prune_reference(theirs, 2, 4, scale)[0].backward(grad)
    assert torch.equal(mine.grad, theirs.grad)


def test_reference_gradcheck():
    # Magnitudes far apart: a finite difference must not change the mask.
    weight = (torch.randperm(22).double() + 1).view(2, 11).requires_grad_()
    assert torch.autograd.gradcheck(lambda weight: nm_prune_reference(weight, 2, 4, None)[0], (weight,))


def test_prune_in_place_takes_a_parameter():
    weight = torch.nn.Parameter(torch.randn(4, 8))
    expected, mask = sk.nm_prune(weight.detach(), 2, 4)
    assert torch.equal(sk.nm_prune_(weight, 2, 4), mask)
    assert torch.equal(weight, expected) and weight.requires_grad and weight.is_leaf


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [(0,), (9,), (3, 12), (2, 3, 7)], ids=shape_id)
def test_opcheck(dtype, shape):
    weight, scale = torch.randn(shape).to(dtype), torch.rand(shape[-1])
    opcheck(OPS.nm_mask.default, (weight, 2, 4))
    opcheck(OPS.nm_prune.default, (weight.clone().requires_grad_(), 2, 4, None))
    opcheck(OPS.nm_prune.default, (weight, 2, 4, scale))
    opcheck(OPS.nm_prune_.default, (weight, 2, 4, None))
    opcheck(OPS.nm_prune_.default, (weight.t() if weight.dim() == 2 else weight, 2, 4, None))


def test_compile_fullgraph():
    def run(weight, scale):
        pruned, mask = sk.nm_prune(weight * 2, 2, 4, scale=scale)
        return pruned + 1, mask & sk.nm_mask(weight, 3, 4), sk.nm_prune_(weight, 1, 4)

    weight, scale = torch.randn(5, 24), torch.rand(24)
    compiled_weight = weight.clone()
    outputs = torch.compile(run, fullgraph=True, backend="aot_eager")(compiled_weight, scale)
    for got, expected in zip((*outputs, compiled_weight), (*run(weight, scale), weight), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("function", [sk.nm_mask, sk.nm_prune, sk.nm_prune_], ids=lambda function: function.__name__)
@pytest.mark.parametrize(
    "make, n, m, error, match",
    [
        (lambda: [1.0], 2, 4, TypeError, r"must be a tensor, got list"),
        (lambda: torch.ones(4, dtype=torch.int64), 2, 4, TypeError, r"float32, float16 or bfloat16, got torch\.int64"),
        (lambda: torch.ones(4, dtype=torch.float64), 2, 4, TypeError, r"got torch\.float64"),
        (lambda: torch.tensor(1.0), 2, 4, ValueError, r"at least one dimension, got a scalar"),
        (lambda: torch.ones(4), 0, 4, ValueError, r"0 < n <= m <= 32, got 0:4"),
        (lambda: torch.ones(4), -1, 4, ValueError, r"got -1:4"),
        (lambda: torch.ones(4), 5, 4, ValueError, r"got 5:4"),
        (lambda: torch.ones(4), 2, 33, ValueError, r"got 2:33"),
        (lambda: torch.ones(4), 2.0, 4, TypeError, r"n must be an int, got 2\.0"),
        (lambda: torch.ones(4), 2, "4", TypeError, r"m must be an int, got '4'"),
    ],
    ids=["list", "int64", "float64", "scalar", "n=0", "n<0", "n>m", "m>32", "n=2.0", "m='4'"],
)
def test_rejects(function, make, n, m, error, match):
    with pytest.raises(error, match=match):
        function(make(), n, m)


@pytest.mark.parametrize("function", [sk.nm_prune, sk.nm_prune_], ids=lambda function: function.__name__)
@pytest.mark.parametrize(
    "scale, error, match",
    [
        (torch.ones(8, dtype=torch.float16), TypeError, r"scale must be torch\.float32, got torch\.float16"),
        (torch.ones(7), ValueError, r"scale must have shape \(8,\), got \(7,\)"),
        (torch.ones(1, 8), ValueError, r"scale must have shape \(8,\), got \(1, 8\)"),
        (torch.ones(8, device="meta"), ValueError, r"scale must be on cpu, got meta"),
        ([1.0] * 8, TypeError, r"scale must be a tensor, got list"),
    ],
    ids=["float16", "short", "matrix", "device", "list"],
)
def test_rejects_scale(function, scale, error, match):
    weight = torch.randn(2, 8)
    before = weight.clone()
    with pytest.raises(error, match=match):
        function(weight, 2, 4, scale=scale)
    assert torch.equal(weight, before)
