import pytest
import torch
from helpers import LAYOUTS, poison
from test_sparsegpt import SHAPES, assert_block, problem

from sparsekit.ops.sparsegpt import sparsegpt_columns_reference

pytestmark = pytest.mark.triton
kernels = pytest.importorskip("sparsekit.triton_kernels.sparsegpt")


def check(gpu, weight, factor, mask, n, m, layout=torch.Tensor.contiguous):
    expected = sparsegpt_columns_reference(weight, factor, mask, n, m)
    poison(weight)
    mask = None if mask is None else layout(mask.to(gpu))
    actual = kernels.sparsegpt_columns(layout(weight.to(gpu)), layout(factor.to(gpu)), mask, n, m)
    assert_block([each.cpu() for each in actual], expected)


@pytest.mark.parametrize(
    "shape, pattern",
    [(shape, (2, 4)) for shape in SHAPES] + [(shape, pattern) for shape in SHAPES[2:4] for pattern in ((3, 5), (4, 8))],
    ids=str,
)
def test_block_equals_the_reference(gpu, shape, pattern):
    check(gpu, *problem(*shape), None, *pattern)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_block_with_a_mask(gpu, layout):
    weight, factor = problem(9, 20)
    check(gpu, weight, factor, torch.rand(9, 20) > 0.5, 2, 4, LAYOUTS[layout])


@pytest.mark.parametrize("name", kernels.TABLE.configs)
def test_every_configuration(gpu, name):
    with kernels.TABLE.force(name):
        check(gpu, *problem(35, 16), None, 2, 4)


def test_ties_keep_the_lower_index(gpu):
    weight = torch.tensor([[1.0, -1, 1, -1, 0, 0, 0, 0]])
    check(gpu, weight, torch.eye(8), None, 2, 4)
