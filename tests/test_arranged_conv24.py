import pytest
import torch
import torch.nn.functional as F
from convolutions import GEOMETRIES, assert_convolution, sparse_conv24
from helpers import LAYOUTS, assert_same, opcheck, poison
from packed_products import assert_equal_gradients, assert_same_for_any_threads, assert_same_in_any_batch

import sparsekit as sk
from sparsekit.ops import ArrangedConv24, arrange24, arrange_conv24, arranged_conv2d24

OP = torch.ops.sparsekit.arranged_conv2d24.default


def arranged(outputs, inputs, *kernel):
    weight, mask = sparse_conv24(outputs, inputs, *kernel)
    return weight, mask, arrange_conv24(sk.pack_conv24(weight, mask))


def test_the_columns_are_channels_of_one_tap_after_another():
    weight, mask = sparse_conv24(5, 12, 2, 3)
    matrix, kept = (each.permute(0, 2, 3, 1).reshape(5, 72) for each in (weight, mask))
    expected = arrange24(sk.pack24(matrix, kept), "row pairs").data
    assert_same(arrange_conv24(sk.pack_conv24(weight, mask)).data, expected)


@pytest.mark.parametrize("inputs", [4, 8, 20])
def test_arranging_keeps_every_bit(simd, inputs):
    packed = sk.pack_conv24(*sparse_conv24(19, inputs, 2, 3))
    arranged = arrange_conv24(packed)
    assert_same(arranged.to_packed().values, packed.values)
    assert_same(arranged.to_packed().bitmask, packed.bitmask)
    assert_same(arranged.to_dense(), packed.to_dense())
    assert arranged.nbytes == len(arranged.data) and arranged.to("meta").data.is_meta


def test_literal(simd):
    weight = torch.zeros(1, 4, 2, 2)
    weight[0, 0, 0, 0], weight[0, 3, 1, 1] = 1, 10
    x = torch.zeros(1, 4, 3, 3)
    x[0, 0], x[0, 3] = (torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]]) * factor for factor in (1, -1))
    arranged = arrange_conv24(sk.pack_conv24(weight))
    assert arranged_conv2d24(x, arranged).tolist() == [[[[-49, -58], [-76, -85]]]]
    assert arranged_conv2d24(x[0], arranged, torch.tensor([1.0]), stride=2).tolist() == [[[-48]]]
    assert arranged_conv2d24(x, arranged, None, 2, 1).tolist() == [[[[-10, -30], [-70, -85]]]]
    assert arranged_conv2d24(x, arranged, dilation=(1, 2)).tolist() == [[[[-59], [-86]]]]
    assert arranged_conv2d24(x, arranged, padding="same").tolist() == [[[[-49, -58, 3], [-76, -85, 6], [7, 8, 9]]]]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 3)], ids=str)
def test_convolution(simd, geometry, kernel):
    for images, outputs, inputs, height, width in [(1, 5, 4, 9, 7), (2, 17, 12, 6, 17), (3, 33, 52, 7, 7)]:
        weight, _, packed = arranged(outputs, inputs, *kernel)
        x, bias = torch.randn(images, inputs, height, width), torch.randn(outputs)
        poison(x.new_empty(images, outputs, height, width))
        assert_convolution(arranged_conv2d24(x, packed, bias, *geometry), x, weight, bias, *geometry)
        assert_convolution(arranged_conv2d24(x[0], packed, None, *geometry), x[0], weight, None, *geometry)


@pytest.mark.parametrize("images, outputs, inputs", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
def test_without_images_or_channels(simd, images, outputs, inputs):
    packed, bias = arrange_conv24(sk.pack_conv24(torch.zeros(outputs, inputs, 3, 3))), torch.randn(outputs)
    x, expected = torch.randn(images, inputs, 5, 6), bias[:, None, None].expand(images, outputs, 5, 6)
    assert_same(arranged_conv2d24(x, packed, bias, padding=1), expected.contiguous())
    assert_same(arranged_conv2d24(x, packed, padding=1), torch.zeros_like(expected).contiguous())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_does_not_swallow_nan(simd, value):
    _, mask, packed = arranged(40, 12)
    x = torch.randn(3, 12, 6, 7)
    x[1, 5, 3, 3] = value
    y = arranged_conv2d24(x, packed, padding=1)
    reached = y[1, :, 2:5, 2:5].clone()
    taps = mask[:, 5].flip(-1, -2)  # the output above and left of an input meets it at the last tap
    assert reached[~taps].isnan().all() and not reached.isfinite().any()
    assert torch.equal(reached[taps].isnan(), torch.full_like(reached[taps], value != value, dtype=torch.bool))
    y[1, :, 2:5, 2:5] = 0
    assert y.isfinite().all()


def test_any_strides(simd):
    _, _, packed = arranged(7, 20)
    x, bias = torch.randn(2, 20, 6, 9), torch.randn(7)
    expected = arranged_conv2d24(x, packed, bias, padding=1)
    for form in LAYOUTS.values():
        strided = packed._replace(data=form(packed.data))
        assert_same(arranged_conv2d24(form(x), strided, torch.stack([bias, bias], 1)[:, 0], padding=1), expected)
    assert_same(arranged_conv2d24(x.contiguous(memory_format=torch.channels_last), packed, bias, padding=1), expected)


@pytest.mark.parametrize("outputs", [70, 530])
def test_threads_and_batches(simd, threads, outputs):
    _, _, packed = arranged(outputs, 20)
    for size in (4, 7, 19):
        x = torch.randn(9, 20, size, size)
        assert_same_for_any_threads(lambda x: arranged_conv2d24(x, packed, padding=1), x, threads)
        assert_same_in_any_batch(lambda x: arranged_conv2d24(x, packed, padding=1), x, 2)


@pytest.mark.parametrize("geometry", [(1, 1, 1), ((2, 1), 0, (1, 2))], ids=str)
def test_gradients(geometry):
    weight, _, packed = arranged(6, 8)
    x, bias = torch.randn(2, 8, 7, 8), torch.randn(6)
    assert_equal_gradients(
        lambda x, bias: arranged_conv2d24(x, packed, bias, *geometry),
        lambda x, bias: F.conv2d(x, weight, bias, *geometry),
        (x, bias), torch.randn_like(F.conv2d(x, weight, bias, *geometry)), rtol=1e-4, atol=1e-4,
    )  # fmt: skip


def test_opcheck():
    _, _, packed = arranged(5, 8)
    x, bias = torch.randn(2, 8, 5, 6, requires_grad=True), torch.randn(5, requires_grad=True)
    geometry = ([3, 3], [1, 2], [1, 0], [1, 1])
    opcheck(OP, (x, packed.data, bias, 5, *geometry))
    opcheck(OP, (x.detach(), packed.data, None, 5, *geometry))


def test_compile_fullgraph():
    def run(x, packed, bias):
        return arranged_conv2d24(x * 2, packed, bias, padding="same") + 1, packed.to_dense()

    arguments = torch.randn(2, 8, 5, 5), arranged(5, 8)[2], torch.randn(5)
    outputs = torch.compile(run, fullgraph=True, backend="aot_eager")(*arguments)
    for got, expected in zip(outputs, run(*arguments), strict=True):
        assert torch.equal(got, expected)


W = arrange_conv24(sk.pack_conv24(torch.zeros(3, 8, 3, 3)))
X = torch.ones(2, 8, 5, 5)


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: arrange_conv24(torch.ones(3, 8, 1, 1)), TypeError, r"packed must be a PackedConv24, .* got Tensor"),
        (
            lambda: arrange_conv24(sk.pack_conv24(torch.zeros(3, 6, 1, 1))),
            ValueError,
            r"a multiple of four input channels to be arranged, got 6",
        ),
        (
            lambda: arrange_conv24(sk.pack_conv24(torch.zeros(3, 8, 1, 1).half())),
            TypeError,
            r"packed\.values must be float32 to be arranged, got torch\.float16",
        ),
        (lambda: arranged_conv2d24(X, tuple(W)), TypeError, r"arranged must be an ArrangedConv24, .* got tuple"),
        (lambda: arranged_conv2d24(X.half(), W), TypeError, r"x must be torch\.float32, got torch\.float16"),
        (lambda: arranged_conv2d24(1, W), TypeError, r"x must be a tensor, got int"),
        (lambda: arranged_conv2d24(X.to("meta"), W), ValueError, r"x must be on cpu, got meta"),
        (lambda: arranged_conv2d24(X[:, :4], W), ValueError, r"x must have shape \[images, 8, .* got \(2, 4, 5, 5\)"),
        (lambda: arranged_conv2d24(X, W, torch.ones(4)), ValueError, r"bias must have shape \(3,\), got"),
        (lambda: arranged_conv2d24(X, W, stride=0), ValueError, r"stride must be one or two numbers of at least 1"),
        (lambda: arranged_conv2d24(X, W, dilation=3), ValueError, r"x must be at least as large as the kernel"),
        (lambda: W._replace(shape=(3, 6, 3, 3)).to_dense(), ValueError, r"a multiple of four input channels and a"),
        (lambda: ArrangedConv24(W.data[:7], W.shape).to_dense(), ValueError, r"must have 16 bytes .* got 7"),
    ],
)  # fmt: skip
def test_rejects(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_data_of_another_weight_is_refused():
    other = arrange_conv24(sk.pack_conv24(torch.zeros(40, 8, 3, 3)))
    with pytest.raises(RuntimeError, match="data has a size that does not fit"):
        arranged_conv2d24(X, ArrangedConv24(other.data[:-4], (40, 8, 3, 3)))
