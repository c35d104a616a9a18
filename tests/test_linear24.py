import pytest
import torch
from helpers import DTYPES, LAYOUTS, assert_product, assert_same, dtype_id, opcheck, poison, sparse24
from packed_products import (
    assert_equal_gradients,
    assert_nan_stays_in_its_token,
    assert_same_for_any_threads,
    assert_same_in_any_batch,
)

import sparsekit as sk
from sparsekit.ops.linear24 import linear24_reference
from sparsekit.ops.sparse24 import pack24_reference

OPS = torch.ops.sparsekit


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_linear_literal(simd, dtype):
    packed = sk.pack24(torch.tensor([[0, 1, 2, 0, 1], [3, 0, 0, -1, 0]], dtype=dtype))
    x = torch.tensor([[1, 2, 3, 4, 5], [0, 0, 1, 1, 0]], dtype=dtype)
    assert sk.linear24(x, packed).tolist() == [[13, -1], [2, -1]]
    assert sk.linear24(x, packed, torch.tensor([1, 2], dtype=dtype)).tolist() == [[14, 1], [3, 1]]
    assert sk.linear24(x[0], packed).tolist() == [13, -1]


def assert_linear(x, weight, bias, packed):
    assert_product(sk.linear24(x, packed, bias), x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [(1, 4), (3, 3), (5, 70), (130, 66), (67, 260), (256, 512)], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 4, 5, 8, 9, 16, 31, 33, 64, 130, 257])
def test_linear(simd, dtype, shape, tokens):
    weight, mask = sparse24(*shape, dtype)
    x, bias = torch.randn(tokens, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
    packed = sk.pack24(weight, mask)
    poison(x.new_empty(tokens, shape[0]))
    assert_linear(x, weight, bias, packed)
    assert_linear(x, weight, None, packed)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("leading", [(), (0,), (2, 0), (2, 3), (1, 2, 3)], ids=str)
def test_linear_leading_dimensions(simd, dtype, leading):
    weight, mask = sparse24(9, 20, dtype)
    assert_linear(torch.randn(*leading, 20).to(dtype), weight, torch.randn(9).to(dtype), sk.pack24(weight, mask))


@pytest.mark.parametrize("rows, cols", [(0, 8), (5, 0), (0, 0)])
@pytest.mark.parametrize("tokens", [3, 17])
def test_linear_without_rows_or_columns(simd, rows, cols, tokens):
    packed, bias = sk.pack24(torch.zeros(rows, cols)), torch.randn(rows)
    assert_same(sk.linear24(torch.randn(tokens, cols), packed, bias), bias.expand(tokens, rows).contiguous())
    assert_same(sk.linear24(torch.randn(tokens, cols), packed), torch.zeros(tokens, rows))


@pytest.mark.parametrize("tokens", [1, 4, 40, 130])
def test_linear_does_not_swallow_nan(simd, tokens):
    weight, mask = sparse24(40, 72)
    packed = sk.pack24(weight, mask)
    assert_nan_stays_in_its_token(lambda x: sk.linear24(x, packed), torch.randn(tokens, 72), mask)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)], ids=dtype_id
)
@pytest.mark.parametrize("leading", [(), (4,), (2, 3)], ids=str)
def test_gradients_of_linear(dtype, tolerance, leading):
    values, bitmask, shape = sk.pack24(*sparse24(6, 18, dtype))
    x, bias, grad = (torch.randn(shape).to(dtype) for shape in ((*leading, 18), (6,), (*leading, 6)))
    assert_equal_gradients(
        lambda x, values, bias: sk.linear24(x, sk.Packed24(values, bitmask, shape), bias),
        lambda x, values, bias: linear24_reference(x, values, bitmask, bias),
        (x, values, bias), grad, rtol=tolerance, atol=tolerance,
    )  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_any_strides(simd, layout, dtype):
    values, bitmask = pack24_reference(*sparse24(7, 70, dtype), True)
    x, bias = torch.randn(3, 70).to(dtype), torch.randn(7).to(dtype)
    x_strided, *strided = (LAYOUTS[layout](tensor) for tensor in (x, values, bitmask))
    y = sk.linear24(x_strided, sk.Packed24(*strided, (7, 70)), torch.stack([bias, bias], 1)[:, 0])
    assert_same(y, sk.linear24(x, sk.Packed24(values, bitmask, (7, 70)), bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("tokens", [1, 4, 16, 200])
def test_threads(simd, threads, dtype, tokens):
    packed = sk.pack24(*sparse24(1030, 516, dtype))
    assert_same_for_any_threads(lambda x: sk.linear24(x, packed), torch.randn(tokens, 516).to(dtype), threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("few, many", [(1, 15), (16, 200)])  # on either side of where the kernel changes
def test_a_token_comes_out_the_same_in_any_batch(simd, dtype, few, many):
    packed, bias = sk.pack24(*sparse24(70, 1030, dtype)), torch.randn(70).to(dtype)
    assert_same_in_any_batch(lambda x: sk.linear24(x, packed, bias), torch.randn(many, 1030).to(dtype), few)


def test_reference_gradcheck():
    weight, mask = sparse24(3, 10)
    values, bitmask = pack24_reference(weight.double(), mask, True)

    def linear(x, values, bias):
        return linear24_reference(x, values, bitmask, bias)

    inputs = [tensor.requires_grad_() for tensor in (torch.randn(2, 10).double(), values, torch.randn(3).double())]
    # Linear in every input, so a wide difference is exact where fp32 sums are not fine enough for a narrow one.
    assert torch.autograd.gradcheck(linear, inputs, eps=0.25, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("rows, cols", [(0, 8), (5, 18)])
def test_opcheck(dtype, rows, cols):
    values, bitmask, _ = sk.pack24(*sparse24(rows, cols, dtype))
    x, bias = (torch.randn(shape).to(dtype).requires_grad_() for shape in ((2, 3, cols), (rows,)))
    opcheck(OPS.linear24.default, (x, values.clone().requires_grad_(), bitmask, bias))
    opcheck(OPS.linear24.default, (x.detach(), values, bitmask, None))


def test_compile_fullgraph():
    def run(x, packed, bias):
        return sk.linear24(x * 2, packed, bias) + 1, sk.linear24(x, packed), packed.to_dense()

    arguments = torch.randn(3, 20), sk.pack24(*sparse24(6, 20)), torch.randn(6)
    outputs = torch.compile(run, fullgraph=True, backend="aot_eager")(*arguments)
    for got, expected in zip(outputs, run(*arguments), strict=True):
        assert torch.equal(got, expected)


W = sk.Packed24(torch.ones(3, 4), torch.full((3, 1), 0x33, dtype=torch.uint8), (3, 8))


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: sk.linear24(torch.ones(2, 8).long(), W), TypeError, r"x must be float32, .* got torch\.int64"),
        (lambda: sk.linear24(torch.tensor(1.0), W), ValueError, r"x must have at least one dimension"),
        (lambda: sk.linear24(torch.ones(2, 8), tuple(W)), TypeError, r"packed must be a Packed24, .* got tuple"),
        (lambda: sk.linear24(torch.ones(2, 8), W._replace(bitmask=None)), TypeError, r"bitmask must be a tensor, got"),
        (lambda: sk.linear24(torch.ones(2, 8), W, 1), TypeError, r"bias must be a tensor, got int"),
        (
            lambda: sk.linear24(torch.ones(2, 7), W),
            ValueError,
            r"x must have 8 columns for a weight of 3 x 8, got shape",
        ),
        (
            lambda: sk.linear24(torch.ones(2, 8), W._replace(bitmask=W.bitmask.int())),
            TypeError,
            r"bitmask must be torch\.uint8, got torch\.int32",
        ),
        (lambda: sk.linear24(torch.ones(2, 8).half(), W), TypeError, r"values must be torch\.float16, got"),
        (lambda: sk.linear24(torch.ones(2, 8).to("meta"), W), ValueError, r"values must be on meta, got cpu"),
        (lambda: sk.linear24(torch.ones(2, 8), W, torch.ones(4)), ValueError, r"bias must have shape \(3,\), got"),
        (lambda: sk.linear24(torch.ones(2, 8), W, torch.ones(3).half()), TypeError, r"bias must be torch\.float32"),
    ],
)
def test_rejects(call, error, match):
    with pytest.raises(error, match=match):
        call()
