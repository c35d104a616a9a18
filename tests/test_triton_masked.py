import pytest
import torch
from helpers import dtype_id, poison, shape_id

from sparsekit.ops import pack_bits
from sparsekit.ops.masked import masked_weight_reference

pytestmark = pytest.mark.triton
kernels = pytest.importorskip("sparsekit.triton_kernels.masked")

CASES = [((3, 700, 1), 700), ((3, 70, 1), 68), ((5, 12, 9), 12), ((2, 23, 7), 20), ((1, 6, 3), 0), ((0, 8, 1), 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("shape, full", CASES, ids=[f"{shape_id(shape)}-{full}" for shape, full in CASES])
def test_equals_reference(gpu, dtype, shape, full):
    weight = torch.randn(shape).to(dtype)
    bits = pack_bits(torch.rand(shape[0] * shape[2] * full) < 0.5)
    expected = masked_weight_reference(weight, bits, full)
    poison(expected)
    assert torch.equal(kernels.masked_weight(weight.to(gpu), bits.to(gpu), full).cpu(), expected)
