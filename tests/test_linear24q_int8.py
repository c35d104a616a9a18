import pytest
import torch
from helpers import DTYPES, LAYOUTS, assert_same, assert_same_sums, dtype_id, hostile, opcheck, poison
from packed_products import assert_nan_stays_in_its_token, assert_same_for_any_threads, assert_same_in_any_batch
from test_quant24 import quantized

import sparsekit as sk
from sparsekit.ops.linear24q_int8 import linear24q_int8_reference
from sparsekit.ops.quant24 import QUANT_TYPES

OPS = torch.ops.sparsekit


def assert_same_as_reference(x, tiled, bias):
    expected = linear24q_int8_reference(x, tiled.tiles, bias, tiled.shape[0], tiled.quant_type, tiled.group)
    assert_same_sums(sk.linear24q_int8(x, tiled, bias), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_literal(every_simd, dtype):
    packed = sk.quantize24(sk.pack24(torch.tensor([[0, 1, 127, 0, 1], [127, 0, 0, -1, 0]], dtype=dtype)))
    x = torch.tensor([[1, 2.4, 2.5, 3.5, 127], [0, 0, -254, 1, 0]], dtype=dtype)  # rounds to 2, 2 and 4; step 2
    expected = torch.tensor([[2 + 254 + 127, 127 - 4], [-254 * 127, 0]], dtype=dtype)
    assert_same(sk.linear24q_int8(x, sk.tile24(packed)), expected)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("shape", [(0, 8), (5, 0), (1, 4), (3, 3), (5, 70), (13, 63), (67, 260)], ids=str)
def test_every_level_gives_the_bits_of_the_reference(every_simd, quant_type, shape):
    tiled = sk.tile24(quantized(*shape, quant_type, group=24 if shape[1] == 70 else 64))
    bias = torch.randn(shape[0])
    for tokens in (0, 1, 2, 3, 4, 5, 7, 18):
        x = torch.randn(tokens, shape[1])
        poison(x.new_empty(tokens, shape[0]))
        assert_same_as_reference(x, tiled, bias if tokens != 5 else None)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("tokens", [1, 4, 40])
def test_hostile_inputs(every_simd, dtype, tokens):
    tiled = sk.tile24(quantized(21, 84, "int8"))
    assert_same_as_reference(hostile(tokens, 84, dtype=dtype), tiled, hostile(21, dtype=dtype))
    assert_same_as_reference(torch.full((tokens, 84), 3e-38).to(dtype), tiled, None)
    assert_same_as_reference(torch.full((tokens, 84), 6e4).to(dtype), tiled, None)


def test_ties_are_rounded_as_the_reference_rounds_them(simd):
    """Of bfloat16 inputs, many are half of the largest, and so halves of a step."""
    tiled = sk.tile24(quantized(9, 64, "int8"))
    assert_same_as_reference(torch.randn(400, 64).bfloat16(), tiled, None)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_the_largest_sums_do_not_saturate(every_simd, quant_type):
    """All codes and inputs at the ends of their ranges: sums of two products are near the end of 16 bits."""
    signs = torch.where(torch.rand(40, 128) < 0.5, -1.0, 1.0)
    for sign in (signs, torch.ones(40, 128), -torch.ones(40, 128)):
        packed = sk.prune_pack24(sign)
        tiled = sk.tile24(sk.quantize24(packed, quant_type))
        for x in (torch.ones(5, 128), -torch.ones(5, 128), signs[:5]):
            assert_same_as_reference(x, tiled, None)
            torch.testing.assert_close(
                sk.linear24q_int8(x, tiled), x @ packed.to_dense().t() * (1 + 0.5 / 127), rtol=1e-2, atol=1e-3
            )


@pytest.mark.parametrize("leading", [(), (0,), (2, 3), (1, 2, 3)], ids=str)
def test_leading_dimensions(every_simd, leading):
    assert_same_as_reference(torch.randn(*leading, 20), sk.tile24(quantized(9, 20, "int4")), torch.randn(9))


@pytest.mark.parametrize("tokens", [1, 4, 40])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_token_that_is_not_finite_is_nan(every_simd, tokens, value):
    tiled = sk.tile24(quantized(40, 72, "int8"))
    everything = torch.ones(40, 72, dtype=torch.bool)
    x = torch.randn(tokens, 72)
    assert_nan_stays_in_its_token(lambda x: sk.linear24q_int8(x, tiled), x, everything, value)
    assert sk.linear24q_int8(x, tiled)[tokens // 2].isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(every_simd, layout):
    tiled, bias, x = sk.tile24(quantized(7, 70, "int8")), torch.randn(7), torch.randn(3, 70)
    strided = tiled._replace(tiles=LAYOUTS[layout](tiled.tiles))
    y = sk.linear24q_int8(LAYOUTS[layout](x), strided, torch.stack([bias, bias], 1)[:, 0])
    assert_same(y, sk.linear24q_int8(x, tiled, bias))


@pytest.mark.parametrize("tokens", [1, 4, 16, 200])
def test_threads(every_simd, threads, tokens):
    tiled = sk.tile24(quantized(1030, 516, "int8"))
    assert_same_for_any_threads(lambda x: sk.linear24q_int8(x, tiled), torch.randn(tokens, 516), threads)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("few, many", [(1, 70), (5, 70)])
def test_a_token_comes_out_the_same_in_any_batch(every_simd, quant_type, few, many):
    tiled, bias = sk.tile24(quantized(70, 1030, quant_type)), torch.randn(70)
    assert_same_in_any_batch(lambda x: sk.linear24q_int8(x, tiled, bias), torch.randn(many, 1030), few)


@pytest.mark.parametrize("quant_type, most", [("int8", 0.015), ("int4", 0.015), ("nf4", 0.025)])
def test_close_to_the_product_with_unrounded_inputs(quant_type, most):
    packed, x = quantized(64, 1024, quant_type), torch.randn(8, 1024)
    expected = sk.linear24q(x, packed)
    assert (sk.linear24q_int8(x, sk.tile24(packed)) - expected).norm() < most * expected.norm()


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("rows, cols", [(0, 8), (5, 19)])
def test_opcheck(quant_type, rows, cols):
    tiled = sk.tile24(quantized(rows, cols, quant_type))
    x, bias = torch.randn(2, 3, cols), torch.randn(rows).requires_grad_()
    opcheck(OPS.linear24q_int8.default, (x.clone().requires_grad_(), tiled.tiles, bias, rows, quant_type, 64))
    opcheck(OPS.linear24q_int8.default, (x, tiled.tiles, None, rows, quant_type, 64))


T = sk.tile24(quantized(3, 8, "int8"))


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: sk.linear24q_int8(torch.ones(2, 8).long(), T), TypeError, r"x must be float32, .* got torch\.int64"),
        (
            lambda: sk.linear24q_int8(torch.ones(2, 8), T.to_quantized()),
            TypeError,
            r"packed must be a TiledWeight24, .* got QuantizedWeight24",
        ),
        (lambda: sk.linear24q_int8(torch.ones(2, 7), T), ValueError, r"x must have 8 columns for a weight of 3 x 8"),
        (lambda: sk.linear24q_int8(torch.ones(2, 8), T, torch.ones(4)), ValueError, r"bias must have shape \(3,\)"),
        (lambda: sk.linear24q_int8(torch.ones(2, 8).to("meta"), T), ValueError, r"tiles must be on meta, got cpu"),
    ],
)
def test_rejects(call, error, match):
    with pytest.raises(error, match=match):
        call()
