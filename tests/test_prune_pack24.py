import pytest
import torch
from helpers import DTYPES, LAYOUTS, assert_same, dtype_id, hostile, opcheck, poison, shape_id, ties
from hypothesis import given
from hypothesis import strategies as st

import sparsekit as sk
from sparsekit.ops.sparse24 import prune_pack24_reference

OPS = torch.ops.sparsekit
SHAPES = [(0, 8), (3, 0), (1, 1), (1, 3), (2, 4), (5, 7), (3, 63), (2, 64), (7, 66), (4, 128), (3, 197), (9, 260)]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_literal(simd, dtype):
    weight = torch.tensor([[1, -2, 3, 4, 5, -5, 5, 5, 9, -0.0], [0, 0, 0, 0, 0, 0, 7, 0, 0, 1]], dtype=dtype)
    values, bitmask, _ = sk.prune_pack24(weight)
    assert values.tolist() == [[3, 4, 5, -5, 9, 0], [0, 0, 0, 7, 0, 1]]
    assert bitmask.tolist() == [[0b0011_1100, 0b11], [0b0101_0011, 0b11]]
    scale = torch.tensor([10, 1, 1, 0.25, 1, 1, 1, 2, 1, 1])
    values, bitmask, _ = sk.prune_pack24(weight, scale=scale)
    assert values.tolist() == [[1, 3, 5, 5, 9, 0], [0, 0, 0, 7, 0, 1]]
    assert bitmask.tolist() == [[0b1001_0101, 0b11], [0b0101_0011, 0b11]]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_every_level_equals_reference(simd, dtype, shape):
    cols = shape[1]
    for weight in (torch.randn(shape).to(dtype), ties(*shape, dtype=dtype), hostile(*shape, dtype=dtype)):
        for scale in (None, torch.rand(cols), hostile(cols), torch.zeros(cols)):
            expected = prune_pack24_reference(weight, scale)
            poison(*expected, *expected)
            for got, want in zip(sk.prune_pack24(weight, scale=scale)[:2], expected, strict=True):
                assert_same(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(simd, layout, dtype):
    weight, scale = hostile(6, 133, dtype=dtype), torch.rand(133)
    expected = prune_pack24_reference(weight, scale)
    strided_scale = torch.stack([scale, scale.neg()], 1)[:, 0]
    for got, want in zip(sk.prune_pack24(LAYOUTS[layout](weight), scale=strided_scale)[:2], expected, strict=True):
        assert_same(got, want)


@pytest.mark.parametrize("scaled", [False, True], ids=["magnitude", "scaled"])
def test_large_and_threads(simd, threads, scaled):
    weight, scale = torch.randn(2055, 2052), torch.rand(2052) if scaled else None
    expected = prune_pack24_reference(weight, scale)
    for count in (1, 2):
        threads(count)
        for got, want in zip(sk.prune_pack24(weight, scale=scale)[:2], expected, strict=True):
            assert_same(got, want)


@given(rows=st.integers(1, 4), cols=st.integers(1, 150), scaled=st.booleans())
def test_unpacks_to_the_pruned_weight(simd, rows, cols, scaled):
    weight, scale = hostile(rows, cols), torch.rand(cols) if scaled else None
    pruned, mask = sk.nm_prune(weight, 2, 4, scale=scale)
    values, bitmask, _ = sk.prune_pack24(weight, scale=scale)
    assert_same(sk.Packed24(values, bitmask, (len(values), cols)).to_dense(), pruned)
    assert_same(sk.ops.unpack_bits(bitmask, cols), mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_gradient(dtype):
    weight, scale = torch.randn(4, 22).to(dtype).requires_grad_(), torch.rand(22)
    values, bitmask, _ = sk.prune_pack24(weight, scale=scale)
    assert not bitmask.requires_grad
    grad = torch.randn_like(values)
    values.backward(grad)
    assert torch.equal(weight.grad, sk.Packed24(grad, bitmask, (len(grad), 22)).to_dense())


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [(0, 8), (3, 12), (5, 7)], ids=shape_id)
def test_opcheck(dtype, shape):
    weight = torch.randn(shape).to(dtype)
    opcheck(OPS.prune_pack24.default, (weight.clone().requires_grad_(), None))
    opcheck(OPS.prune_pack24.default, (weight, torch.rand(shape[1])))


def test_compile_fullgraph():
    def run(weight, scale):
        values, bitmask, _ = sk.prune_pack24(weight * 2, scale=scale)
        return values + 1, bitmask

    arguments = torch.randn(5, 26), torch.rand(26)
    outputs = torch.compile(run, fullgraph=True, backend="aot_eager")(*arguments)
    for got, expected in zip(outputs, run(*arguments), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda w: sk.prune_pack24(w.int()), TypeError, r"weight must be float32, .* got torch\.int32"),
        (lambda w: sk.prune_pack24(w[0]), ValueError, r"weight must have 2 dimensions, got shape \(8,\)"),
        (lambda w: sk.prune_pack24(w, scale=[1.0] * 8), TypeError, r"scale must be a tensor, got list"),
        (lambda w: sk.prune_pack24(w, scale=torch.ones(8).half()), TypeError, r"scale must be torch\.float32"),
        (lambda w: sk.prune_pack24(w, scale=torch.ones(7)), ValueError, r"scale must have shape \(8,\), got \(7,\)"),
        (lambda w: sk.prune_pack24(w, scale=torch.ones(8, device="meta")), ValueError, r"must be on cpu, got meta"),
    ],
    ids=["int32", "vector", "list", "float16", "short", "device"],
)
def test_rejects(call, error, match):
    with pytest.raises(error, match=match):
        call(torch.ones(4, 8))
