import pytest
import torch
from helpers import DTYPES, LAYOUTS, assert_same, dtype_id, hostile, opcheck, pattern_id, poison, shape_id
from hypothesis import given
from hypothesis import strategies as st

import sparsekit as sk
from sparsekit.ops.nm import nm_mask_bits_reference, nm_mask_reference

NAN = float("nan")
OPS = torch.ops.sparsekit
PATTERNS = [(2, 4), (1, 4), (4, 4), (4, 8), (1, 1), (1, 2), (2, 5), (3, 7), (8, 16), (31, 32)]
SHAPES = [(0,), (1,), (3,), (8,), (37,), (3, 0), (0, 8), (7, 33), (2, 3, 5), (2, 3, 2, 12), (5, 1031), (64, 256)]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    "score, n, m, bits",
    [
        ([1, -4, 3, 2, 5, 5, 5, 5], 2, 4, [0b0011_0110]),
        ([1, 2, 3, 4, 9, 0, -7], 2, 4, [0b0111_1100]),
        ([NAN, 1, NAN, NAN, 1, 2, 3, 4, 1, 1], 2, 4, [0b1100_0101, 0b11]),
        ([8, 7, 6, 5, 4, 3, 2, 1, 1], 4, 8, [0b0000_1111, 0b1]),
        ([1, 2, 3, 3, 2, 1, 0, 5, 6, 1], 2, 3, [0b1001_1110, 0b11]),
        ([1], 1, 1, [1]),
    ],
    ids=["ties", "tail-kept", "nan", "4of8", "2of3", "one"],
)
def test_literal(simd, dtype, score, n, m, bits):
    assert_same(sk.nm_mask_bits(torch.tensor(score, dtype=dtype), n, m), torch.tensor(bits, dtype=torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("pattern", PATTERNS, ids=pattern_id)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_every_level_equals_reference(simd, dtype, pattern, shape):
    score = hostile(*shape, dtype=dtype)
    expected = nm_mask_bits_reference(score, *pattern)
    poison(expected, expected)
    assert_same(sk.nm_mask_bits(score, *pattern), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (3, 5)], ids=pattern_id)
@pytest.mark.parametrize("shape", [(35,), (6, 40), (4, 3, 21)], ids=shape_id)
def test_any_strides(simd, layout, pattern, shape):
    score = hostile(*shape)
    assert_same(sk.nm_mask_bits(LAYOUTS[layout](score), *pattern), nm_mask_bits_reference(score, *pattern))


@pytest.mark.parametrize("pattern", [(2, 4), (3, 7), (8, 16)], ids=pattern_id)
@pytest.mark.parametrize("shape", [(1, 70000), (3001, 24), (1031, 1028)], ids=shape_id)
def test_large_and_threads(simd, threads, pattern, shape):
    score = torch.randn(shape)
    expected = nm_mask_bits_reference(score, *pattern)
    for count in (1, 2):
        threads(count)
        assert_same(sk.nm_mask_bits(score, *pattern), expected)


@given(rows=st.integers(0, 4), cols=st.integers(1, 150), m=st.integers(1, 32), data=st.data())
def test_unpacks_to_the_mask(simd, rows, cols, m, data):
    n, score = data.draw(st.integers(1, m)), hostile(rows, cols)
    bits = sk.nm_mask_bits(score, n, m)
    assert torch.equal(sk.ops.unpack_bits(bits, cols), nm_mask_reference(score, n, m))
    assert not sk.ops.unpack_bits(bits, bits.shape[1] * 8)[:, cols:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [(0,), (9,), (3, 12)], ids=shape_id)
def test_opcheck(dtype, shape):
    opcheck(OPS.nm_mask_bits.default, (torch.randn(shape).to(dtype), 2, 4))
    opcheck(OPS.nm_mask_bits.default, (torch.randn(shape).to(dtype).t(), 3, 5))


def test_compile_fullgraph():
    score = torch.randn(5, 27)
    compiled = torch.compile(lambda score: sk.nm_mask_bits(score * 2, 2, 4), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(score), sk.nm_mask_bits(score, 2, 4))


@pytest.mark.parametrize(
    "make, n, m, error, match",
    [
        (lambda: [1.0], 2, 4, TypeError, r"score must be a tensor, got list"),
        (lambda: torch.ones(4).double(), 2, 4, TypeError, r"float32, float16 or bfloat16, got torch\.float64"),
        (lambda: torch.ones(()), 2, 4, ValueError, r"at least one dimension, got a scalar"),
        (lambda: torch.ones(4), 0, 4, ValueError, r"needs 0 < n <= m <= 32, got 0:4"),
        (lambda: torch.ones(4), 4, 33, ValueError, r"needs 0 < n <= m <= 32, got 4:33"),
        (lambda: torch.ones(4), 2, 4.0, TypeError, r"m must be an int, got 4\.0"),
    ],
    ids=["list", "float64", "scalar", "n=0", "m>32", "m=4.0"],
)
def test_rejects(make, n, m, error, match):
    with pytest.raises(error, match=match):
        sk.nm_mask_bits(make(), n, m)
