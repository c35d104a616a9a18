import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, LAYOUTS, assert_product, assert_same, dtype_id, opcheck, poison, sparse24
from packed_products import assert_nan_stays_in_its_token, assert_same_for_any_threads, assert_same_in_any_batch
from test_quant24 import quantized

import sparsekit as sk
from sparsekit.ops.quant24 import QUANT_TYPES

OPS = torch.ops.sparsekit


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_literal(simd, dtype):
    packed = sk.quantize24(sk.pack24(torch.tensor([[0, 1, 127, 0, 1], [127, 0, 0, -1, 0]], dtype=dtype)))
    x = torch.tensor([[1, 2, 3, 4, 5], [0, 0, 1, 1, 0]], dtype=dtype)
    expected = torch.tensor([[2 + 381 + 5, 123], [127, -1]], dtype=dtype)
    assert_same(sk.linear24q(x, packed), expected)
    assert sk.linear24q(x[1], packed, torch.tensor([1, 2], dtype=dtype)).tolist() == [128, 1]


def assert_linear(x, packed, bias):
    assert_product(sk.linear24q(x, packed, bias), x, packed._replace(dtype=torch.float32).to_dense(), bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("shape", [(0, 8), (5, 0), (1, 4), (3, 3), (5, 70), (13, 63), (67, 260)], ids=str)
def test_linear(simd, dtype, quant_type, shape):
    packed = quantized(*shape, quant_type, group=24 if shape[1] == 70 else 64)
    bias = torch.randn(shape[0]).to(dtype)
    for tokens in (0, 1, 3, 5, 16, 33):
        x = torch.randn(tokens, shape[1]).to(dtype)
        poison(x.new_empty(tokens, shape[0]))
        assert_linear(x, packed, bias if tokens != 5 else None)


@pytest.mark.parametrize("leading", [(), (0,), (2, 3), (1, 2, 3)], ids=str)
def test_leading_dimensions(simd, leading):
    assert_linear(torch.randn(*leading, 20), quantized(9, 20, "int4"), torch.randn(9))


@pytest.mark.parametrize("tokens", [1, 4, 40])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_does_not_swallow_nan(simd, tokens, quant_type):
    weight, mask = sparse24(40, 72)
    packed = sk.quantize24(sk.pack24(weight, mask), quant_type)
    assert_nan_stays_in_its_token(lambda x: sk.linear24q(x, packed), torch.randn(tokens, 72), mask)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_any_strides(simd, layout, quant_type):
    packed, bias, x = quantized(7, 70, quant_type), torch.randn(7), torch.randn(3, 70)
    strided = packed._replace(
        **{name: LAYOUTS[layout](getattr(packed, name)) for name in ("values", "scales", "bitmask")}
    )
    y = sk.linear24q(LAYOUTS[layout](x), strided, torch.stack([bias, bias], 1)[:, 0])
    assert_same(y, sk.linear24q(x, packed, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("tokens", [1, 4, 16, 200])
def test_threads(simd, threads, dtype, tokens):
    packed = quantized(1030, 516, "int8")
    assert_same_for_any_threads(lambda x: sk.linear24q(x, packed), torch.randn(tokens, 516).to(dtype), threads)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("few, many", [(1, 15), (16, 70)])  # on either side of where the kernel changes
def test_a_token_comes_out_the_same_in_any_batch(simd, quant_type, few, many):
    packed, bias = quantized(70, 1030, quant_type), torch.randn(70)
    assert_same_in_any_batch(lambda x: sk.linear24q(x, packed, bias), torch.randn(many, 1030), few)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("product", ["linear24q", "linear24q_int8"])
def test_gradients_are_those_of_the_dense_product(dtype, product):
    packed = quantized(6, 19, "int8")
    weight = packed._replace(dtype=torch.float32).to_dense()
    x, bias, grad = (torch.randn(shape).to(dtype) for shape in ((2, 3, 19), (6,), (2, 3, 6)))
    x, bias = x.requires_grad_(), bias.requires_grad_()
    getattr(sk, product)(x, packed if product == "linear24q" else sk.tile24(packed), bias).backward(grad)
    assert_same(x.grad, (grad.float() @ weight).to(dtype))
    torch.testing.assert_close(bias.grad, grad.sum((0, 1)))


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("rows, cols", [(0, 8), (5, 19)])
def test_opcheck(quant_type, rows, cols):
    packed = quantized(rows, cols, quant_type)
    x, bias = torch.randn(2, 3, cols), torch.randn(rows).requires_grad_()
    opcheck(OPS.linear24q.default, (x.clone().requires_grad_(), *packed[:3], bias, quant_type, 64))
    opcheck(OPS.linear24q.default, (x, *packed[:3], None, quant_type, 64))


def test_compile_fullgraph():
    def run(x, packed, tiled, bias):
        return sk.linear24q(x * 2, packed, bias) + 1, sk.linear24q_int8(x, tiled), packed.to_dense()

    packed = quantized(6, 20, "int4")
    arguments = torch.randn(3, 20), packed, sk.tile24(packed), torch.randn(6)
    outputs = torch.compile(run, fullgraph=True, backend="aot_eager")(*arguments)
    for got, expected in zip(outputs, run(*arguments), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("product", [sk.linear24q, sk.linear24q_int8])
def test_functorch(product):
    packed = quantized(6, 20, "int8")
    packed = packed if product is sk.linear24q else sk.tile24(packed)
    x = torch.randn(3, 20)
    torch.testing.assert_close(torch.func.vmap(lambda each: product(each, packed))(x), product(x, packed))


def test_weights_are_not_rounded_to_the_dtype_of_x(simd):
    packed = quantized(8, 64, "int8")
    x = torch.eye(64).bfloat16()
    assert_same(sk.linear24q(x, packed), packed.to_dense().t().bfloat16().contiguous())
    total = F.linear(torch.ones(64), packed.to_dense())
    torch.testing.assert_close(sk.linear24q(torch.ones(64).half(), packed), total.half())


Q = quantized(3, 8, "int8")


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: sk.linear24q(torch.ones(2, 8).long(), Q), TypeError, r"x must be float32, .* got torch\.int64"),
        (lambda: sk.linear24q(torch.ones(2, 8), sk.tile24(Q)), TypeError, r"must be a QuantizedWeight24, .* got Tiled"),
        (lambda: sk.linear24q(torch.ones(2, 7), Q), ValueError, r"x must have 8 columns for a weight of 3 x 8, got"),
        (lambda: sk.linear24q(torch.ones(2, 8), Q, torch.ones(4)), ValueError, r"bias must have shape \(3,\), got"),
        (lambda: sk.linear24q(torch.ones(2, 8), Q, torch.ones(3).half()), TypeError, r"bias must be torch\.float32"),
        (lambda: sk.linear24q(torch.ones(2, 8).to("meta"), Q), ValueError, r"scales must be on meta, got cpu"),
    ],
)
def test_rejects(call, error, match):
    with pytest.raises(error, match=match):
        call()
