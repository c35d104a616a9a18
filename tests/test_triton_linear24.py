import pytest
import torch
from helpers import DTYPES, LAYOUTS, assert_product, assert_same, dtype_id, sparse24
from triton_linear import KERNELS, NAN, random, record_grids

from sparsekit.ops.linear24 import linear24_reference
from sparsekit.ops.sparse24 import pack24_reference

pytestmark = pytest.mark.triton
pytest.importorskip("triton")
from sparsekit.triton_kernels import linear24 as family  # noqa: E402
from sparsekit.triton_kernels.linear24 import TABLE, linear24  # noqa: E402

HALVES = (torch.float16, torch.bfloat16)
FAST = "32x8"  # the configuration with the fewest steps to interpret


def packed(gpu, rows, cols, dtype):
    weight, mask = sparse24(rows, cols, dtype)
    values, bitmask = pack24_reference(weight, mask, True)
    return weight.to(gpu), values.to(gpu), bitmask.to(gpu)


def assert_linear(x, weight, values, bitmask, bias):
    assert_product(linear24(x, values, bitmask, bias), x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_literal(gpu, dtype):
    weight = torch.tensor([[0, 1, 2, 0, 1], [3, 0, 0, -1, 0]], dtype=dtype)
    values, bitmask = (part.to(gpu) for part in pack24_reference(weight, None, True))
    x = torch.tensor([[1, 2, 3, 4, 5], [0, 0, 1, 1, 0]], dtype=dtype, device=gpu)
    with TABLE.force(FAST):
        assert linear24(x, values, bitmask, None).tolist() == [[13, -1], [2, -1]]
        assert linear24(x[0], values, bitmask, torch.tensor([1, 2], dtype=dtype, device=gpu)).tolist() == [14, 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_every_pattern_of_a_group(gpu, dtype):
    """Each of the six pairs of kept columns in each of eight places, column by column."""
    pairs = [(first, second) for first in range(4) for second in range(first + 1, 4)]
    weight = torch.zeros(6, 32, dtype=dtype)
    for row in range(6):
        for group in range(8):
            first, second = pairs[(row + group) % 6]
            weight[row, 4 * group + first], weight[row, 4 * group + second] = 3, -5
    values, bitmask = (part.to(gpu) for part in pack24_reference(weight, None, True))
    with TABLE.force(FAST):
        assert linear24(torch.eye(32, dtype=dtype, device=gpu), values, bitmask, None).tolist() == weight.t().tolist()


@pytest.mark.parametrize(
    "dtype, tokens",
    [(torch.bfloat16, tokens) for tokens in (0, 1, 5, 8, 16, 33, 64, 65)]
    + [(torch.float16, tokens) for tokens in (1, 17)]
    + [(torch.float32, tokens) for tokens in (0, 1, 3, 17, 65)],
    ids=dtype_id,
)
def test_tokens(gpu, dtype, tokens):
    weight, values, bitmask = packed(gpu, 19, 70, dtype)
    x, bias = random(gpu, tokens, 70, dtype=dtype), random(gpu, 19, dtype=dtype)
    with TABLE.force(FAST):
        assert_linear(x, weight, values, bitmask, bias)


@pytest.mark.parametrize("dtype", KERNELS, ids=dtype_id)
@pytest.mark.parametrize("rows, cols", [(1, 4), (3, 3), (5, 64), (33, 256), (18, 543)])
def test_shapes(gpu, dtype, rows, cols):
    weight, values, bitmask = packed(gpu, rows, cols, dtype)
    x = random(gpu, 3, cols, dtype=dtype)
    with TABLE.force(FAST):
        assert_linear(x, weight, values, bitmask, None)
        assert_linear(x[:1], weight, values, bitmask, random(gpu, rows, dtype=dtype))


@pytest.mark.parametrize("name", TABLE.configs)
def test_every_configuration(gpu, name):
    weight, values, bitmask = packed(gpu, 17, 1090, torch.bfloat16)
    x, bias = random(gpu, 2, 1090, dtype=torch.bfloat16), random(gpu, 17, dtype=torch.bfloat16)
    with TABLE.force(name):
        assert_linear(x, weight, values, bitmask, bias)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter runs one program after another")
@pytest.mark.parametrize("name", [FAST, "128x8_split"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_the_same_bits_every_time(gpu, dtype, name):
    _, values, bitmask = packed(gpu, 17, 530, dtype)
    x = random(gpu, 2, 530, dtype=dtype)
    with TABLE.force(name):
        assert_same(linear24(x, values, bitmask, None), linear24(x, values, bitmask, None))


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("leading", [(), (0,), (2, 0), (2, 3), (1, 2, 3)], ids=str)
def test_leading_dimensions(gpu, dtype, leading):
    weight, values, bitmask = packed(gpu, 9, 20, dtype)
    with TABLE.force(FAST):
        assert_linear(random(gpu, *leading, 20, dtype=dtype), weight, values, bitmask, random(gpu, 9, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("rows, cols", [(0, 8), (5, 0), (0, 0)])
def test_without_rows_or_columns(gpu, dtype, rows, cols):
    _, values, bitmask = packed(gpu, rows, cols, dtype)
    x, bias = random(gpu, 3, cols, dtype=dtype), random(gpu, rows, dtype=dtype)
    assert_same(linear24(x, values, bitmask, bias), bias.expand(3, rows).contiguous())
    assert_same(linear24(x, values, bitmask, None), torch.zeros(3, rows, dtype=dtype, device=gpu))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "strided"])
@pytest.mark.parametrize(
    "dtype, cols", [(torch.bfloat16, 70), (torch.bfloat16, 128), (torch.float32, 70)], ids=dtype_id
)
def test_any_strides(gpu, layout, dtype, cols):
    _, values, bitmask = packed(gpu, 7, cols, dtype)
    x, bias = random(gpu, 3, cols, dtype=dtype), random(gpu, 7, dtype=dtype)
    with TABLE.force(FAST):
        expected = linear24(x, values, bitmask, bias)
        for which in range(3):  # one at a time: each has its own way to be read word by word
            operands = [LAYOUTS[layout](part) if which == i else part for i, part in enumerate((x, values, bitmask))]
            assert_same(linear24(*operands, torch.stack([bias, bias], 1)[:, 0]), expected)


@pytest.mark.parametrize("dtype", KERNELS, ids=dtype_id)
def test_rows_of_a_wider_tensor(gpu, dtype):
    """The values as the front of rows that go on, of every length modulo a word and a vector."""
    weight, values, bitmask = packed(gpu, 9, 132, dtype)
    x = random(gpu, 2, 132, dtype=dtype)
    with TABLE.force(FAST):
        for extra in (1, 2, 6, 8):
            wider = values.new_full((9, 66 + extra), NAN)
            wider[:, :66] = values
            assert_linear(x, weight, wider[:, :66], bitmask, None)


@pytest.mark.parametrize("dtype", KERNELS, ids=dtype_id)
@pytest.mark.parametrize("tokens", [4, 17])
def test_does_not_swallow_nan(gpu, dtype, tokens):
    weight, mask = sparse24(24, 75, dtype)
    values, bitmask = (part.to(gpu) for part in pack24_reference(weight, mask, True))
    x = random(gpu, tokens, 75, dtype=dtype)
    cols = (0, 70, 73)  # 73 is in the tail
    for token, col in enumerate(cols):
        x[token, col] = NAN
    with TABLE.force(FAST):
        hit = torch.isnan(linear24(x, values, bitmask, None)).cpu()
    for token, col in enumerate(cols):
        assert hit[token][mask[:, col]].all()
    assert not hit[len(cols) :].any()


def test_fp32_is_not_rounded_to_tf32(gpu):
    values, bitmask = (part.to(gpu) for part in pack24_reference(torch.tensor([[1.0, 2**-20, 0, 0]]), None, True))
    x = torch.tensor([[1 + 2**-20, 1, 0, 0]], device=gpu)
    assert linear24(x, values, bitmask, None).item() == 1 + 2**-19


def test_splits_add_up_in_order(gpu, monkeypatch):
    """Three splits of the columns on a pretended GPU, each launch of which is counted."""
    weight, values, bitmask = packed(gpu, 5, 1100, torch.bfloat16)
    x, bias = random(gpu, 2, 1100, dtype=torch.bfloat16), random(gpu, 5, dtype=torch.bfloat16)
    monkeypatch.setattr(family, "processors", lambda tensor: 3)
    grids = record_grids(monkeypatch, family, "_linear24_kernel")
    with TABLE.force("128x8_split"):
        assert_linear(x, weight, values, bitmask, bias)
    assert grids == [(1, 3)]


@pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
def test_matches_the_reference_where_sums_are_exact(gpu, dtype):
    weight, mask = sparse24(24, 136, dtype)
    weight = torch.where(mask, weight.sign(), 0)
    values, bitmask = pack24_reference(weight, mask, True)
    x, bias = torch.randint(-3, 4, (10, 136)).to(dtype), torch.randint(-3, 4, (24,)).to(dtype)
    with TABLE.force(FAST):
        actual = linear24(x.to(gpu), values.to(gpu), bitmask.to(gpu), bias.to(gpu))
    assert_same(actual.cpu(), linear24_reference(x, values, bitmask, bias))


@pytest.mark.parametrize("bucket", [1, 8, 16, 32, 64])
def test_every_shape_class_has_a_configuration(bucket):
    shapes = {"small": (768, 3072), "medium": (4096, 4096), "wide": (14336, 4096), "deep": (4096, 14336)}
    for size, (rows, cols) in shapes.items():
        shape_class = family._shape_class(bucket, rows, cols)
        assert shape_class == f"{bucket}_{size}"
        assert TABLE.name("", shape_class) in TABLE.configs


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of the interpreter, which is NumPy
@pytest.mark.parametrize("dtype", KERNELS, ids=dtype_id)
def test_what_is_not_finite_comes_out_as_in_the_dense_product(gpu, dtype):
    _, values, bitmask = packed(gpu, 40, 38, dtype)
    x = random(gpu, 3, 38, dtype=dtype)
    x[0, 37], x[1, 5], x[2, 20] = float("inf"), NAN, -float("inf")
    with TABLE.force(FAST):
        y, expected = linear24(x, values, bitmask, None), linear24_reference(x, values, bitmask, None)
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())
    assert torch.equal(y[y.isinf()], expected[expected.isinf()])
