import pytest
import torch
from helpers import DTYPES, LAYOUTS, assert_same, dtype_id, hostile, opcheck, poison, shape_id, ties
from hypothesis import given
from hypothesis import strategies as st

import sparsekit as sk
from sparsekit.ops.transposable import PATTERNS, tile_masks, transposable_mask24_reference

NAN, INF = float("nan"), float("inf")
OPS = torch.ops.sparsekit
SHAPES = [
    (0, 8),
    (8, 0),
    (1, 1),
    (3, 3),
    (4, 3),
    (3, 4),
    (4, 4),
    (5, 9),
    (8, 31),
    (12, 32),
    (7, 68),
    (17, 131),
    (8, 256),
]


def rows(mask):
    return ["".join("x" if kept else "." for kept in row) for row in mask.tolist()]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    "score, kept",
    [
        ([[0] * 4] * 4, ["xx..", "xx..", "..xx", "..xx"]),
        ([[0, 1, 1, 0], [1, 0, 0, -1], [1, 0, 0, 1], [0, 1, -1, 0]], [".xx.", "x..x", "x..x", ".xx."]),
        # Two of every row alone are columns 0 and 1 (10 + 9); columns 2 and 3 then go to the rows that lose least.
        ([[10, 9, 8, 7], [10, 9, 0, 0], [10, 9, 0, 0], [10, 9, 8, 7]], ["..xx", "xx..", "xx..", "..xx"]),
        ([[0, 0, 0, NAN], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]], ["x..x", "xx..", ".xx.", "..xx"]),
        ([[0, 0, -INF, NAN], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]], ["x.x.", "xx..", ".x.x", "..xx"]),
        ([[1, 2, 3], [4, 5, 6], [7, 8, 9], [1, 2, 3]], ["...", "xxx", "xxx", "..."]),
        ([[1, 2, 3, 4, 5]], ["..xxx"]),
        ([[1, 2], [3, 4]], ["xx", "xx"]),
    ],
    ids=["ties", "two-by-two", "exact", "nan", "nan-is-inf", "columns", "rows", "corner"],
)
def test_literal(simd, dtype, score, kept):
    assert rows(sk.transposable_mask24(torch.tensor(score, dtype=dtype))) == kept


def test_every_pattern_is_found(simd):
    assert len(PATTERNS) == 90
    tiles = tile_masks(torch.device("cpu"))
    assert torch.equal(tiles.sum(1), torch.full((90, 4), 2)) and torch.equal(tiles.sum(2), torch.full((90, 4), 2))
    mask = tiles.transpose(0, 1).flatten(1)  # the tiles beside one another
    assert torch.equal(sk.transposable_mask24(torch.where(mask, -2.0, 1.0)), mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_every_level_equals_reference(simd, dtype, shape):
    for score in (torch.randn(shape).to(dtype), ties(*shape, dtype=dtype), hostile(*shape, dtype=dtype)):
        expected = transposable_mask24_reference(score)
        poison(expected, expected)
        assert_same(sk.transposable_mask24(score), expected)


def test_sums_that_round_keep_the_earlier_pattern(simd):
    score = torch.randint(1, 8, (64, 256)).float() * 4096.0 ** torch.randint(3, (64, 256))
    assert_same(sk.transposable_mask24(score), transposable_mask24_reference(score))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(simd, layout, dtype):
    score = hostile(14, 75, dtype=dtype)
    assert_same(sk.transposable_mask24(LAYOUTS[layout](score)), transposable_mask24_reference(score))


def test_large_and_threads(simd, threads):
    score = torch.randn(514, 1030)
    expected = transposable_mask24_reference(score)
    for count in (1, 2):
        threads(count)
        assert_same(sk.transposable_mask24(score), expected)


@given(height=st.integers(1, 4), width=st.integers(1, 12))
def test_two_of_every_row_and_column(simd, height, width):
    tiles = sk.transposable_mask24(hostile(4 * height, 4 * width)).unflatten(0, (height, 4)).unflatten(2, (width, 4))
    assert (tiles.sum(1) == 2).all() and (tiles.sum(3) == 2).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [(0, 4), (8, 12), (7, 9)], ids=shape_id)
def test_opcheck(dtype, shape):
    opcheck(OPS.transposable_mask24.default, (torch.randn(shape).to(dtype),))
    opcheck(OPS.transposable_mask24.default, (torch.randn(shape).to(dtype).t(),))


def test_compile_fullgraph():
    score = torch.randn(9, 14)
    compiled = torch.compile(lambda score: sk.transposable_mask24(score * 2), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(score), sk.transposable_mask24(score))


@pytest.mark.parametrize(
    "make, error, match",
    [
        (lambda: [[1.0]], TypeError, r"score must be a tensor, got list"),
        (lambda: torch.ones(4, 4).double(), TypeError, r"score must be float32, .* got torch\.float64"),
        (lambda: torch.ones(4), ValueError, r"score must have 2 dimensions, got shape \(4,\)"),
        (lambda: torch.ones(1, 4, 4), ValueError, r"score must have 2 dimensions, got shape \(1, 4, 4\)"),
    ],
    ids=["list", "float64", "vector", "batch"],
)
def test_rejects(make, error, match):
    with pytest.raises(error, match=match):
        sk.transposable_mask24(make())
