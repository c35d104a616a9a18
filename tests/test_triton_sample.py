import pytest
import torch
from helpers import LAYOUTS, pattern_id, poison, shape_id

from sparsekit.ops.bits import unpack_bits
from sparsekit.ops.sample import nm_policy_step_inplace_reference, nm_sample_reference

pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),  # NumPy, interpreting
]
kernels = pytest.importorskip("sparsekit.triton_kernels.sample")

CASES = [((2, 4), shape) for shape in ((3,), (37,), (0, 8), (2, 3, 8), (2, 136))]
CASES += [(pattern, (2, 24)) for pattern in ((1, 4), (3, 4), (2, 2), (4, 8))] + [((2, 7), (3, 16)), ((5, 16), (1, 32))]
SEED, OFFSET = -7, 2**33


def check(base, gpu, n, m, layout=torch.Tensor.contiguous):
    """Both launchers against the reference, on logits that the layout made of ``base``."""
    expected, advantage = base.clone(), torch.tensor(-0.7)
    drawn = nm_sample_reference(base, n, m, SEED, OFFSET)
    after = nm_policy_step_inplace_reference(expected, drawn, advantage, 0.3, n, m, SEED, OFFSET)
    logits = layout(base.to(gpu))
    poison(drawn, after)
    bits = kernels.nm_sample(logits, n, m, SEED, OFFSET)
    assert torch.equal(bits.cpu(), drawn)
    assert torch.equal(kernels.nm_policy_step_(logits, bits, advantage.to(gpu), 0.3, n, m, SEED, OFFSET).cpu(), after)
    assert torch.equal(logits.cpu().contiguous(), expected)


@pytest.mark.parametrize(
    "pattern, shape", CASES, ids=[f"{pattern_id(pattern)}-{shape_id(shape)}" for pattern, shape in CASES]
)
def test_equals_reference(gpu, pattern, shape):
    check(3 * torch.randn(shape), gpu, *pattern)


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8)], ids=pattern_id)
def test_bfloat16_is_rounded_alike(gpu, pattern):
    check((3 * torch.randn(3, 24)).bfloat16(), gpu, *pattern)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_strides(gpu, layout):
    check(torch.randn(6, 12), gpu, 2, 4, layout)


def test_entries_that_cannot_be_drawn(gpu):
    logits = torch.tensor([[float("-inf"), 0, float("-inf"), 0], [1e30, -1e30, 0, -1e30]], device=gpu)
    mask = unpack_bits(kernels.nm_sample(logits, 2, 4, 0, 0).cpu(), 4)
    assert mask.tolist() == [[False, True, False, True], [True, False, True, False]]
