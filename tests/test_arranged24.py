import pytest
import torch
from helpers import DTYPES, LAYOUTS, assert_product, assert_same, dtype_id, opcheck, poison, shape_id, sparse24
from packed_products import (
    assert_equal_gradients,
    assert_nan_stays_in_its_token,
    assert_same_for_any_threads,
    assert_same_in_any_batch,
)

import sparsekit as sk
from sparsekit.ops import Arranged24, arrange24, arranged_linear24, input_pairs24, row_pairs24
from sparsekit.ops._define import reference_of

OPS = torch.ops.sparsekit
FORMS = ("input pairs", "row pairs")
EVERY = pytest.mark.parametrize("layout", FORMS)
STEMS = {"input pairs": input_pairs24, "row pairs": row_pairs24}


def arranged(layout, rows, cols, dtype=torch.float32):
    weight, mask = sparse24(rows, cols, dtype)
    return weight, mask, arrange24(sk.pack24(weight, mask), layout)


def numbers(data, *counts):
    """The bytes as float32 and int16 numbers in turns, by the count and the kind of each."""
    parts = data.split([count * kind.itemsize for count, kind in counts])
    return [part.clone().view(kind).tolist() for part, (_, kind) in zip(parts, counts, strict=True)]


def test_input_pairs_literal():
    packed = sk.pack24(torch.tensor([[0.0, 1, 2, 0, 3, 0, 0, 4, 5, 6, 7]]))
    weights, offsets, others = numbers(
        arrange24(packed, "input pairs").data, (8, torch.float32), (4, torch.int16), (60, torch.int16)
    )
    assert weights == [1, 2, 3, 4, 5, 6, 7, 0]
    assert offsets == [3 * 64, (6 + 2) * 64, 12 * 64, 18 * 64]
    assert others[:16] == [0] * 16  # rows are filled up to four


def test_row_pairs_literal():
    rows = torch.tensor([[1.0, 2, 0, 0, 3, 0, 4, 0], [0, 0, 5, 6, 0, 7, 8, 0], [9, 10, 0, 0, 0, 11, 12, 0]])
    data = arrange24(sk.pack24(rows), "row pairs").data
    starts, head, shared, rest, weights, alone, same, last = numbers(
        data, (2, torch.int64), (4, torch.int16), (2, torch.int16), (4, torch.int16), (8, torch.float32),
        (4, torch.int16), (4, torch.int16), (8, torch.float32),
    )  # fmt: skip
    assert starts == [16, len(data)]
    assert head == [0, 2, 2, 0] and alone == [1, 3, 4, 0]  # rows 0 and 2 share three inputs, which is rounded to two
    assert shared == [0, 64] and rest == [4 * 64, 5 * 64, 6 * 64, 6 * 64]
    assert weights == [1, 9, 2, 10, 3, 11, 4, 12]
    assert same == [2 * 64, 3 * 64, 5 * 64, 6 * 64] and last == [5, 0, 6, 0, 7, 0, 8, 0]


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_linear_literal(simd, layout, dtype):
    packed = sk.pack24(torch.tensor([[0, 1, 2, 0, 1], [3, 0, 0, -1, 0]], dtype=dtype))
    x = torch.tensor([[1, 2, 3, 4, 5], [0, 0, 1, 1, 0]], dtype=dtype)
    assert arranged_linear24(x, arrange24(packed, layout)).tolist() == [[13, -1], [2, -1]]
    bias = torch.tensor([1, 2], dtype=dtype)
    assert arranged_linear24(x, arrange24(packed, layout), bias).tolist() == [[14, 1], [3, 1]]
    assert arranged_linear24(x[0], arrange24(packed, layout)).tolist() == [13, -1]


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [(0, 8), (5, 0), (1, 1), (2, 66), (19, 95), (33, 63), (530, 52)], ids=shape_id)
def test_bytes_are_those_of_the_reference(simd, layout, dtype, shape):
    weight, mask = sparse24(*shape, dtype)
    packed = sk.pack24(
        weight.where(~mask, torch.randint(-(2**15), 2**15, shape).short().view(torch.bfloat16).to(dtype)), mask
    )
    got, stem = arrange24(packed, layout), STEMS[layout]
    rows, cols = shape
    if layout == "row pairs" and rows < 100:
        pairs = row_pairs24._match(packed.bitmask, cols)
        assert torch.equal(pairs, reference_of(row_pairs24._match)(packed.bitmask, cols))
    if rows < 100:
        rest = (cols, len(got.data))
        if layout == "row pairs":
            rest = (pairs, row_pairs24.pair_starts(pairs, rows, cols, dtype.itemsize), *rest)
        assert_same(got.data, reference_of(stem._arrange)(packed.values, packed.bitmask, *rest))
        values, bitmask = reference_of(stem._restore)(got.data, rows, cols, dtype)
        assert_same(values, packed.values)
        assert_same(bitmask, packed.bitmask)
    assert_same(got.to_packed().values, packed.values)
    assert_same(got.to_packed().bitmask, packed.bitmask)
    assert_same(got.to_dense(), packed.to_dense())
    assert got.nbytes == len(got.data)


@EVERY
def test_bytes_do_not_depend_on_the_threads(layout, threads):
    packed, results = sk.pack24(*sparse24(1030, 100)), []
    for count in (1, 2):
        threads(count)
        results.append(arrange24(packed, layout).data)
    assert_same(*results)


def test_pairs_share_most_of_their_inputs():
    pairs = row_pairs24._match(sk.pack24(*sparse24(512, 480)).bitmask, 480)
    assert (
        pairs[..., 2].float().mean() > 16 and pairs[:, :, :, :2].flatten(2).sort(-1).values.unique(dim=1).shape[1] == 1
    )


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [(3, 3), (130, 66), (270, 203)], ids=shape_id)
@pytest.mark.parametrize("tokens", [0, 1, 5, 9, 33, 130])
def test_linear(simd, layout, dtype, shape, tokens):
    weight, _, packed = arranged(layout, *shape, dtype)
    x, bias = torch.randn(tokens, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
    poison(x.new_empty(tokens, shape[0]))
    assert_product(arranged_linear24(x, packed, bias), x, weight, bias)
    assert_product(arranged_linear24(x, packed), x, weight, None)


@EVERY
@pytest.mark.parametrize("leading", [(), (0,), (2, 0), (2, 3), (1, 2, 3)], ids=str)
def test_leading_dimensions(simd, layout, leading):
    weight, _, packed = arranged(layout, 9, 20)
    x, bias = torch.randn(*leading, 20), torch.randn(9)
    assert_product(arranged_linear24(x, packed, bias), x, weight, bias)


@EVERY
@pytest.mark.parametrize("rows, cols", [(0, 8), (5, 0), (0, 0)])
def test_without_rows_or_columns(simd, layout, rows, cols):
    packed, bias = arrange24(sk.pack24(torch.zeros(rows, cols)), layout), torch.randn(rows)
    assert_same(arranged_linear24(torch.randn(17, cols), packed, bias), bias.expand(17, rows).contiguous())
    assert_same(arranged_linear24(torch.randn(17, cols), packed), torch.zeros(17, rows))


@EVERY
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tokens", [1, 4, 40, 130])
def test_does_not_swallow_nan(simd, layout, tokens, value):
    _, mask, packed = arranged(layout, 43, 75)
    assert_nan_stays_in_its_token(lambda x: arranged_linear24(x, packed), torch.randn(tokens, 75), mask, value)
    x = torch.ones(tokens, 75)
    x[0, 5] = value
    assert torch.equal(arranged_linear24(x, packed)[0].isnan(), ~mask[:, 5] | (torch.tensor(value != value)))


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_any_strides(simd, layout, dtype):
    _, _, packed = arranged(layout, 7, 70, dtype)
    x, bias = torch.randn(3, 70).to(dtype), torch.randn(7).to(dtype)
    expected = arranged_linear24(x, packed, bias)
    for form in LAYOUTS.values():
        strided = packed._replace(data=form(packed.data))
        assert_same(arranged_linear24(form(x), strided, torch.stack([bias, bias], 1)[:, 0]), expected)


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("tokens", [1, 16, 200])
def test_threads(simd, threads, layout, dtype, tokens):
    _, _, packed = arranged(layout, 1030, 260, dtype)
    assert_same_for_any_threads(lambda x: arranged_linear24(x, packed), torch.randn(tokens, 260).to(dtype), threads)


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("few", [1, 9, 70])
def test_a_token_comes_out_the_same_in_any_batch(simd, layout, dtype, few):
    _, _, packed = arranged(layout, 70, 1030, dtype)
    bias = torch.randn(70).to(dtype)
    assert_same_in_any_batch(lambda x: arranged_linear24(x, packed, bias), torch.randn(200, 1030).to(dtype), few)


@EVERY
@pytest.mark.parametrize("leading", [(), (4,), (2, 3)], ids=str)
def test_gradients(layout, leading):
    weight, _, packed = arranged(layout, 6, 18)
    x, bias, grad = (torch.randn(shape) for shape in ((*leading, 18), (6,), (*leading, 6)))
    assert_equal_gradients(
        lambda x, bias: arranged_linear24(x, packed, bias),
        lambda x, bias: torch.nn.functional.linear(x, weight, bias),
        (x, bias), grad, rtol=1e-5, atol=1e-5,
    )  # fmt: skip


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("rows, cols", [(0, 8), (5, 18)])
def test_opcheck(layout, dtype, rows, cols):
    packed, stem = sk.pack24(*sparse24(rows, cols, dtype)), STEMS[layout]
    data = arrange24(packed, layout).data
    rest = (cols, len(data))
    if layout == "row pairs":
        opcheck(stem._match, (packed.bitmask, cols))
        pairs = stem._match(packed.bitmask, cols)
        rest = (pairs, row_pairs24.pair_starts(pairs, rows, cols, dtype.itemsize), *rest)
    opcheck(stem._arrange, (packed.values, packed.bitmask, *rest))
    opcheck(stem._restore, (data, rows, cols, dtype))
    x, bias = (torch.randn(shape).to(dtype).requires_grad_() for shape in ((2, 3, cols), (rows,)))
    opcheck(stem._linear, (x, data, bias, rows))
    opcheck(stem._linear, (x.detach(), data, None, rows))


@EVERY
def test_compile_fullgraph(layout):
    def run(x, packed, bias):
        return arranged_linear24(x * 2, packed, bias) + 1, packed.to_dense()

    arguments = torch.randn(3, 20), arranged(layout, 6, 20)[2], torch.randn(6)
    outputs = torch.compile(run, fullgraph=True, backend="aot_eager")(*arguments)
    for got, expected in zip(outputs, run(*arguments), strict=True):
        assert torch.equal(got, expected)


W = Arranged24(torch.zeros(4 * 4 * 10, dtype=torch.uint8), (3, 8), torch.float32, "input pairs")


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: arrange24(torch.ones(3, 8), "row pairs"), TypeError, r"packed must be a Packed24, .* got Tensor"),
        (lambda: arrange24(sk.pack24(torch.zeros(3, 8)), "rows"), ValueError, r"layout must be one of .* got 'rows'"),
        (lambda: arranged_linear24(torch.ones(2, 8).long(), W), TypeError, r"x must be float32, .* got torch\.int64"),
        (lambda: arranged_linear24(torch.ones(2, 8), tuple(W)), TypeError, r"must be an Arranged24, .* got tuple"),
        (lambda: arranged_linear24(torch.ones(2, 8), W, 1), TypeError, r"bias must be a tensor, got int"),
        (lambda: arranged_linear24(torch.ones(2, 7), W), ValueError, r"x must have 8 columns for a weight of 3 x 8"),
        (lambda: arranged_linear24(torch.ones(2, 8).half(), W), TypeError, r"x must be torch\.float32 as the weight"),
        (lambda: arranged_linear24(torch.ones(2, 8).to("meta"), W), ValueError, r"x must be on cpu, got meta"),
        (lambda: W._replace(layout="x").to_dense(), ValueError, r"layout must be one of .* got 'x'"),
        (lambda: W._replace(shape=(3,)).to_dense(), ValueError, r"shape must be rows and columns, got \(3,\)"),
        (lambda: W._replace(dtype=torch.int8).to_dense(), TypeError, r"dtype must be float32, .* got torch\.int8"),
        (lambda: W._replace(data=W.data.int()).to_dense(), TypeError, r"data must be torch\.uint8, got torch\.int32"),
        (lambda: W._replace(data=W.data[1:]).to_dense(), ValueError, r"must have 160 bytes for 3 x 8 .* got 159"),
        (lambda: W._replace(data=W.data[:7], layout="row pairs").to_dense(), ValueError, r"have 16 bytes .* got 7"),
    ],
)  # fmt: skip
def test_rejects(call, error, match):
    with pytest.raises(error, match=match):
        call()
