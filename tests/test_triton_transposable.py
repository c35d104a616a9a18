import pytest
import torch
from helpers import DTYPES, LAYOUTS, assert_same, dtype_id, hostile, poison, ties

from sparsekit.ops.transposable import transposable_mask24_reference

pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),  # NumPy, interpreting
]
kernels = pytest.importorskip("sparsekit.triton_kernels.transposable")


def check(base, gpu, layout=torch.Tensor.contiguous):
    expected = transposable_mask24_reference(base)
    score = layout(base.to(gpu))
    poison(expected)
    assert_same(kernels.transposable_mask24(score).cpu(), expected)


def bools(*rows):
    return torch.tensor([[char == "x" for char in row] for row in rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_literal(gpu, dtype):
    # Row by row, (0, 1) would win three times: the columns allow it twice.
    score = torch.tensor([[9, 8, 1, 1], [9, 8, 1, 1], [7, 6, 1, 1], [-5, 1, 1, 1]], dtype=dtype, device=gpu)
    assert_same(kernels.transposable_mask24(score).cpu(), bools("xx..", "xx..", "..xx", "..xx"))
    score[2, 3] = -20
    score[3, 0] = float("nan")  # as Inf, so column 0 is kept here and the best of the rest follows
    assert_same(kernels.transposable_mask24(score).cpu(), bools("xx..", ".xx.", "..xx", "x..x"))


def test_ties_keep_the_earlier_pattern(gpu):
    score = torch.ones(4, 4, device=gpu)
    assert_same(kernels.transposable_mask24(score).cpu(), bools("xx..", "xx..", "..xx", "..xx"))


SHAPES = [(0, 0), (0, 5), (5, 0), (1, 1), (3, 9), (9, 3), (4, 4), (8, 24), (13, 42), (6, 1036)]


@pytest.mark.parametrize(
    "shape, dtype",
    [(shape, torch.bfloat16) for shape in SHAPES]
    + [(shape, dtype) for shape in ((9, 3), (13, 42)) for dtype in (torch.float32, torch.float16)],
    ids=dtype_id,
)
def test_shapes(gpu, shape, dtype):
    check(hostile(*shape, dtype=dtype), gpu)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_ties(gpu, dtype):
    check(ties(24, 64, dtype=dtype), gpu)
    check(ties(24, 64, dtype=dtype).abs().clamp(max=1), gpu)


def test_sums_round_in_the_documented_order(gpu):
    # Magnitudes far apart: another order of the sums rounds, and so ties, otherwise.
    check(torch.tensor([0.0, 1.0, 2.0, 2.0**24])[torch.randint(4, (64, 256))], gpu)
    check(torch.full((4, 8), 3e38) * torch.rand(4, 8), gpu)  # sums that overflow are equal


@pytest.mark.parametrize("name", kernels.TABLE.configs)
def test_every_configuration(gpu, name):
    with kernels.TABLE.force(name):
        check(torch.randn(8, 2060).bfloat16(), gpu)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(gpu, layout):
    check(ties(11, 21), gpu, LAYOUTS[layout])
