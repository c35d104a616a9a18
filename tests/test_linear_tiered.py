import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, LAYOUTS, assert_product, assert_same, dtype_id, opcheck, poison
from packed_products import (
    assert_equal_gradients,
    assert_nan_stays_in_its_token,
    assert_same_for_any_threads,
    assert_same_in_any_batch,
)
from tiering import BLOCKS, tiered

import sparsekit as sk

OPS = torch.ops.sparsekit
NAN = float("nan")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("tokens", [1, 2, 16])
def test_literal(simd, dtype, tokens):
    weight = torch.zeros(17, 40, dtype=dtype)
    weight[:16, :16] = 1  # dense
    weight[:16, 17:32:2] = torch.arange(1, 9).to(dtype)  # two of every four: 36
    weight[3, 38], weight[1, 33] = 5, 7  # top-k
    packed = sk.pack_tiered(weight, k=3)
    y = sk.linear_tiered(torch.ones(tokens, 40, dtype=dtype), packed)
    assert y.tolist() == [[52, 59, 52, 57] + [52] * 12 + [0]] * tokens
    y = sk.linear_tiered(torch.ones(40, dtype=dtype), packed, torch.arange(17).to(dtype))
    assert y.tolist() == [52, 60, 54, 60, *range(56, 68), 16]


def assert_linear(x, weight, bias, packed):
    assert_product(sk.linear_tiered(x, packed, bias), x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [(1, 1), (17, 23), (130, 263), (256, 512)], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 3, 4, 7, 15, 16, 33, 64, 130])
def test_linear(simd, dtype, shape, tokens):
    weight, _ = tiered(*shape, dtype=dtype)
    x, bias = torch.randn(tokens, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
    packed = sk.pack_tiered(weight)
    poison(x.new_empty(tokens, shape[0]))
    assert_linear(x, weight, bias, packed)
    assert_linear(x, weight, None, packed)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("k", [0, 10, 72])
@pytest.mark.parametrize("tokens", [1, 5, 40, 130])
def test_linear_blocks(simd, block, k, tokens):
    weight, _ = tiered(150, 263, block, k=k)
    assert_linear(torch.randn(tokens, 263), weight, None, sk.pack_tiered(weight, k=k, block=block))


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("keep", ["all", "2:4", "none"])
def test_linear_of_one_form(simd, keep, tokens):
    weight = torch.randn(48, 64)
    if keep == "2:4":
        weight = sk.nm_prune(weight, 2, 4)[0]
    for k in (0, 256):
        packed = sk.pack_tiered(weight * (keep != "none"), k=k)
        assert len(packed.tiers.unique()) == 1
        assert_linear(torch.randn(tokens, 64), weight * (keep != "none"), torch.randn(48), packed)


@pytest.mark.parametrize("leading", [(), (0,), (2, 0), (2, 3), (1, 2, 3)], ids=str)
def test_leading_dimensions(simd, leading):
    weight, _ = tiered(9, 20)
    assert_linear(torch.randn(*leading, 20), weight, torch.randn(9), sk.pack_tiered(weight))


@pytest.mark.parametrize("rows, cols", [(0, 8), (5, 0), (0, 0)])
@pytest.mark.parametrize("tokens", [3, 17])
def test_without_rows_or_columns(simd, rows, cols, tokens):
    packed, bias = sk.pack_tiered(torch.zeros(rows, cols)), torch.randn(rows)
    x = torch.randn(tokens, cols)
    assert_same(sk.linear_tiered(x, packed, bias), bias.expand(tokens, rows).contiguous())
    assert_same(sk.linear_tiered(x, packed), torch.zeros(tokens, rows))


@pytest.mark.parametrize("value", [NAN, float("inf")])
@pytest.mark.parametrize("tokens", [1, 4, 40, 130])
def test_does_not_swallow_nan_nor_spread_it(simd, tokens, value):
    weight, mask = tiered(40, 71)
    packed, x = sk.pack_tiered(weight), torch.randn(tokens, 71)  # the last column is beside the padding
    assert_nan_stays_in_its_token(lambda x: sk.linear_tiered(x, packed), x, mask, value)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("tokens", [3, 17])
def test_any_strides(simd, layout, dtype, tokens):
    packed = sk.pack_tiered(tiered(33, 70, dtype=dtype)[0])
    x, bias = torch.randn(tokens, 70).to(dtype), torch.randn(33).to(dtype)
    strided = sk.TieredWeight(*map(LAYOUTS[layout], packed.tensors), packed.shape)
    strided_bias = torch.stack([bias, bias], 1)[:, 0]
    assert_same(
        sk.linear_tiered(LAYOUTS[layout](x), strided, strided_bias),
        sk.linear_tiered(x, packed, bias),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("tokens", [1, 4, 16, 200])
def test_threads(simd, threads, dtype, tokens):
    packed = sk.pack_tiered(tiered(1030, 516, dtype=dtype)[0])
    assert_same_for_any_threads(lambda x: sk.linear_tiered(x, packed), torch.randn(tokens, 516).to(dtype), threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("few, many", [(1, 6), (16, 200)])  # on either side of where the kernel changes
def test_a_token_comes_out_the_same_in_any_batch(simd, dtype, few, many):
    packed, bias = sk.pack_tiered(tiered(70, 1030, dtype=dtype)[0]), torch.randn(70).to(dtype)
    assert_same_in_any_batch(lambda x: sk.linear_tiered(x, packed, bias), torch.randn(many, 1030).to(dtype), few)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=dtype_id)
@pytest.mark.parametrize("leading", [(), (4,), (2, 3)], ids=str)
def test_gradients(dtype, tolerance, leading):
    weight, mask = tiered(33, 40, dtype=dtype)
    x, bias, grad = (torch.randn(shape).to(dtype) for shape in ((*leading, 40), (33,), (*leading, 33)))
    assert_equal_gradients(
        lambda x, weight, bias: sk.linear_tiered(x, sk.pack_tiered(weight, mask), bias),
        lambda x, weight, bias: F.linear(x, torch.where(mask, weight, 0), bias),
        (x, weight, bias), grad, rtol=tolerance, atol=10 * tolerance,
    )  # fmt: skip


def test_padding_of_topk_has_no_gradient():
    weight = torch.zeros(16, 16)
    weight[0, 0], weight[2, 3] = 1, 2
    packed = sk.pack_tiered(weight, k=4)
    packed = packed._replace(topk=packed.topk.requires_grad_())
    sk.linear_tiered(torch.ones(3, 16), packed).sum().backward()
    assert packed.topk.grad.tolist() == [[3, 3, 0, 0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("rows, cols", [(0, 16), (33, 40)])
def test_opcheck(dtype, rows, cols):
    packed = sk.pack_tiered(tiered(rows, cols, dtype=dtype)[0])
    trained = [part.requires_grad_() if part.dtype == dtype else part for part in packed.tensors]
    x, bias = (torch.randn(shape).to(dtype).requires_grad_() for shape in ((2, 3, cols), (rows,)))
    opcheck(OPS.linear_tiered.default, (x, *trained, bias, rows))
    opcheck(OPS.linear_tiered.default, (x.detach(), *(part.detach() for part in packed.tensors), None, rows))


def test_compile_fullgraph():
    def run(x, packed, bias):
        return sk.linear_tiered(x * 2, packed, bias) + 1, packed.to_dense()

    arguments = torch.randn(3, 40), sk.pack_tiered(tiered(33, 40)[0]), torch.randn(33)
    outputs = torch.compile(run, fullgraph=True, backend="aot_eager")(*arguments)
    for got, expected in zip(outputs, run(*arguments), strict=True):
        assert torch.equal(got, expected)


P = sk.pack_tiered(torch.randn(24, 32))


@pytest.mark.parametrize(
    "call, error, match",
    [
        (
            lambda: sk.linear_tiered(torch.ones(2, 32).long(), P),
            TypeError,
            r"x must be float32, .* got",
        ),
        (lambda: sk.linear_tiered(torch.tensor(1.0), P), ValueError, r"x must have at least one dim"),
        (lambda: sk.linear_tiered(torch.ones(2, 32), P[:6]), TypeError, r"TieredWeight, got tuple"),
        (
            lambda: sk.linear_tiered(torch.ones(2, 33), P),
            ValueError,
            r"x must have 32 columns for a weight of 24 x 32, got shape \(2, 33\)",
        ),
        (
            lambda: sk.linear_tiered(torch.ones(2, 32), P._replace(shape=(16, 32))),
            ValueError,
            r"tiers must have shape \(1, 2\)",
        ),
        (lambda: sk.linear_tiered(torch.ones(2, 32).half(), P), TypeError, r"dense must be torch\.fl"),
        (
            lambda: sk.linear_tiered(torch.ones(2, 32).to("meta"), P),
            ValueError,
            r"packed\.dense must be on meta, got cpu",
        ),
        (
            lambda: sk.linear_tiered(torch.ones(2, 32), P, torch.ones(32)),
            ValueError,
            r"bias must have shape \(24,\), got \(32,\)",
        ),
    ],
)
def test_rejects(call, error, match):
    with pytest.raises(error, match=match):
        call()
