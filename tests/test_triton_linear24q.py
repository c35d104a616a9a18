import pytest
import torch
from helpers import DTYPES, LAYOUTS, assert_product, assert_same, dtype_id
from test_quant24 import quantized
from triton_linear import NAN, random, record_grids

from sparsekit.ops.linear24q import linear24q_reference
from sparsekit.ops.quant24 import NF4_LEVELS, QUANT_TYPES, QuantizedWeight24

pytestmark = pytest.mark.triton
pytest.importorskip("triton")
from sparsekit.triton_kernels import linear24q as family  # noqa: E402
from sparsekit.triton_kernels.linear24q import TABLE, linear24q  # noqa: E402

EACH_TYPE = pytest.mark.parametrize("quant_type", QUANT_TYPES)
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


def product(gpu, x, packed, bias):
    return linear24q(x, *packed.to(gpu)[:3], bias, packed.quant_type, packed.group)


def assert_linear(gpu, tokens, rows, cols, quant_type, dtype, group=64):
    packed = quantized(rows, cols, quant_type, group=group)
    x, bias = random(gpu, tokens, cols, dtype=dtype), random(gpu, rows, dtype=dtype)
    weight = packed._replace(dtype=torch.float32).to_dense().to(gpu)
    for each in (bias, None):
        assert_product(product(gpu, x, packed, each), x, weight, each)


@EACH_DTYPE
def test_literal(gpu, dtype):
    values = torch.tensor([[127, -3, 5]], dtype=torch.int8)
    bitmask = torch.tensor([[0b11010]], dtype=torch.uint8)  # columns 1 and 3, and the tail
    packed = QuantizedWeight24(values, torch.tensor([[0.5]]).bfloat16(), bitmask, (1, 5), "int8", 64, dtype)
    x = torch.tensor([[9, 2, 9, 4, 6]], dtype=dtype, device=gpu)
    assert product(gpu, x, packed, None).tolist() == [[127 - 6 + 15]]
    assert product(gpu, x[0], packed, torch.ones(1, dtype=dtype, device=gpu)).tolist() == [137]


@pytest.mark.parametrize("quant_type, numbers", [("int4", [*range(8), 0, *range(-7, 0)]), ("nf4", NF4_LEVELS)])
@EACH_DTYPE
def test_every_code_of_four_bits_is_the_number_that_it_stands_for(gpu, quant_type, numbers, dtype):
    codes = torch.tensor([code for code in range(16) if quant_type == "nf4" or code != 8], dtype=torch.uint8)
    values = torch.stack([codes, codes.flip(0)], 1)
    bitmask = torch.full((1, 1), 0b1001, dtype=torch.uint8).expand(len(codes), 1)
    scales = torch.full((len(codes), 1), 2.0).bfloat16()
    packed = QuantizedWeight24(
        values[:, :1] | values[:, 1:] << 4, scales, bitmask, (len(codes), 4), quant_type, 64, dtype
    )
    y = product(gpu, torch.eye(4, dtype=dtype, device=gpu), packed, None).cpu()
    expected, step = (
        2 * torch.tensor(numbers)[codes.long()],
        torch.finfo(dtype).eps,
    )  # the interpreter cuts bfloat16 off
    torch.testing.assert_close(y[0], expected.to(dtype), rtol=step, atol=0)
    torch.testing.assert_close(y[3], expected.flip(0).to(dtype), rtol=step, atol=0)
    assert not y[1:3].any()


@EACH_TYPE
@EACH_DTYPE
def test_types(gpu, quant_type, dtype):
    assert_linear(gpu, 3, 19, 70, quant_type, dtype)


@EACH_TYPE
@pytest.mark.parametrize("cols", [1, 2, 3, 4, 63, 128, 131, 200])
def test_columns(gpu, quant_type, cols):
    assert_linear(gpu, 2, 5, cols, quant_type, torch.bfloat16)


@pytest.mark.parametrize("group", [8, 16, 24, 72, 128, 1000])
def test_groups(gpu, group):
    for quant_type in QUANT_TYPES:
        assert_linear(gpu, 2, 5, 283, quant_type, torch.float16, group)


@pytest.mark.parametrize("tokens", [0, 1, 16, 17, 33, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_tokens(gpu, tokens, dtype):
    assert_linear(gpu, tokens, 67, 140, "int8", dtype)


@EACH_TYPE
@pytest.mark.parametrize("name", TABLE.configs)
def test_every_configuration(gpu, name, quant_type):
    with TABLE.force(name):
        assert_linear(gpu, 5, 21, 330, quant_type, torch.bfloat16)


@pytest.mark.parametrize("leading", [(), (2, 0), (2, 3), (1, 2, 3)], ids=str)
def test_leading_dimensions(gpu, leading):
    packed, x = quantized(9, 20, "int4"), random(gpu, *leading, 20, dtype=torch.bfloat16)
    assert_product(product(gpu, x, packed, None), x, packed.to_dense().to(gpu), None)


@EACH_DTYPE
@pytest.mark.parametrize("rows, cols", [(0, 8), (5, 0), (0, 0)])
def test_without_rows_or_columns(gpu, dtype, rows, cols):
    packed, bias = quantized(rows, cols, "int8"), random(gpu, rows, dtype=dtype)
    x = random(gpu, 3, cols, dtype=dtype)
    assert_same(product(gpu, x, packed, bias), bias.expand(3, rows).contiguous())
    assert_same(product(gpu, x, packed, None), torch.zeros(3, rows, dtype=dtype, device=gpu))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "strided"])
def test_any_strides(gpu, layout):
    packed, x, bias = quantized(7, 70, "int4"), torch.randn(3, 70), torch.randn(7)
    expected = linear24q_reference(x, *packed[:3], bias, "int4", 64)
    tensors = [LAYOUTS[layout](each).to(gpu) for each in (x, *packed[:3])]
    y = linear24q(*tensors, torch.stack([bias, bias], 1).to(gpu)[:, 0], "int4", 64)
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of the interpreter, which is NumPy
@EACH_TYPE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_what_is_not_finite_comes_out_as_in_the_dense_product(gpu, quant_type, dtype):
    packed = quantized(40, 38, quant_type, group=24)  # a group ends within what is loaded at once
    x = torch.randn(4, 38).to(dtype)
    x[0, 37], x[1, 5], x[2, 23] = float("inf"), NAN, -float("inf")
    y = product(gpu, x.to(gpu), packed, None).cpu()
    expected = linear24q_reference(x, *packed[:3], None, quant_type, 24)
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())
    assert torch.equal(y[y.isinf()], expected[expected.isinf()]) and y[3].isfinite().all()


def test_weights_are_not_rounded_to_the_dtype_of_x(gpu):
    packed, x = quantized(8, 64, "nf4"), torch.ones(1, 64, dtype=torch.float16, device=gpu)
    dense = packed.to_dense().double()
    assert not torch.equal(dense.half().double().sum(1).half(), dense.sum(1).half())
    assert torch.equal(product(gpu, x, packed, None).cpu()[0], dense.sum(1).half())


def test_fp32_is_not_rounded_to_tf32(gpu):
    scales, bitmask = torch.ones(1, 1).bfloat16(), torch.tensor([[0b0011]], dtype=torch.uint8)
    values = torch.tensor([[1, 1]], dtype=torch.int8)
    packed = QuantizedWeight24(values, scales, bitmask, (1, 4), "int8", 64, torch.float32)
    assert product(gpu, torch.tensor([[1 + 2**-20, 1, 0, 0]], device=gpu), packed, None).item() == 2 + 2**-20


def test_every_number_of_tokens_has_a_configuration(gpu, monkeypatch):
    grids = record_grids(monkeypatch, family, "_linear24q_kernel")
    for tokens in (1, 16, 17, 32, 33, 65):
        assert_linear(gpu, tokens, 65, 8, "int8", torch.float32)
    assert grids[::2] == [(5,), (5,), (5,), (5,), (2,), (4,)]
