"""SparseGPT on consecutive columns, at every SIMD level."""

import pytest
import torch
from helpers import poison

from sparsekit.ops import sparsegpt_columns
from sparsekit.ops.sparsegpt import sparsegpt_columns_reference
from sparsekit.prune.second_order import upper_factor

SHAPES = [(1, 1), (3, 4), (5, 7), (16, 64), (9, 130), (0, 8), (4, 0)]


def problem(rows, cols):
    x = torch.randn(2 * cols + 1, cols) @ torch.randn(cols, cols)
    factor = upper_factor(x.t() @ x, 0.01).inverse() if cols else torch.zeros(0, 0)
    return torch.randn(rows, cols), factor.contiguous()


def assert_block(actual, expected):
    """The masks are equal; sums of the same products in the same order agree to the last bit or two."""
    assert torch.equal(actual[2], expected[2])
    for one, other in zip(actual[:2], expected[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
        assert torch.equal(one == 0, other == 0)


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8), (3, 5), (16, 32)], ids=lambda p: f"{p[0]}of{p[1]}")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_block_equals_the_reference(simd, shape, pattern):
    weight, factor = problem(*shape)
    expected = sparsegpt_columns_reference(weight, factor, None, *pattern)
    poison(weight)
    assert_block(sparsegpt_columns(weight, factor, n=pattern[0], m=pattern[1]), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_block_with_a_mask_strided(simd, shape):
    weight, factor = problem(*shape)
    mask = torch.rand(shape) > 0.5
    expected = sparsegpt_columns_reference(weight, factor, mask, 1, 1)
    wide = torch.full((shape[0], 2 * shape[1]), float("nan"))
    wide[:, ::2] = weight
    assert_block(sparsegpt_columns(wide[:, ::2], factor.t().contiguous().t(), mask=mask), expected)


def test_ties_keep_the_lower_index(simd):
    pruned, error, mask = sparsegpt_columns(torch.tensor([[1.0, -1, 1, -1, 0, 0, 0, 0]]), torch.eye(8))
    assert mask.tolist() == [[True, True, False, False] * 2]
    assert pruned.tolist() == [[1, -1, 0, 0, 0, 0, 0, 0]] and error.tolist() == [[0, 0, 1, -1, 0, 0, 0, 0]]


def test_compiles_and_follows_its_schema():
    weight, factor = problem(6, 12)
    torch.library.opcheck(torch.ops.sparsekit.sparsegpt_columns.default, (weight, factor, None, 2, 4))
    compiled = torch.compile(lambda w: sparsegpt_columns(w, factor)[0], fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(weight), sparsegpt_columns(weight, factor)[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.zeros(2, 3, 4)}, ValueError, r"weight must have 2 dimensions, got shape \(2, 3, 4\)"),
        ({"weight": torch.zeros(2, 4).half()}, TypeError, r"weight must be torch.float32, got torch.float16"),
        ({"factor": torch.zeros(4, 3)}, ValueError, r"factor must have shape \(4, 4\), got \(4, 3\)"),
        ({"mask": torch.zeros(2, 4)}, TypeError, r"mask must be torch.bool, got torch.float32"),
        ({"n": 5}, ValueError, r"0 < n <= m <= 32, got 5:4"),
    ],
)
def test_block_rejects(change, error, message):
    with pytest.raises(error, match=message):
        sparsegpt_columns(**{"weight": torch.zeros(2, 4), "factor": torch.eye(4), **change})
