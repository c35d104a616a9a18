import pytest
import torch
import torch.nn.functional as F
from convolutions import GEOMETRIES, assert_convolution, sparse_conv24
from helpers import DTYPES, LAYOUTS, assert_same, dtype_id, opcheck, poison
from packed_products import assert_equal_gradients, assert_same_for_any_threads, assert_same_in_any_batch

import sparsekit as sk
from sparsekit.ops.conv24 import conv2d24_reference

OPS = torch.ops.sparsekit


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_pack_literal(dtype):
    weight = torch.tensor([0, 1, 2, 0, 5, 0, 3, 0, 4, 6], dtype=dtype).view(1, 2, 5).permute(0, 2, 1)[:, :, None]
    packed = sk.pack_conv24(weight)  # one output, five inputs, a kernel of one row and two columns
    assert packed.shape == (1, 5, 1, 2)
    assert packed.values.tolist() == [[[1, 2, 5], [3, 4, 6]]] and packed.bitmask.tolist() == [[[0b1_0110], [0b1_1010]]]
    assert packed.nbytes == 6 * weight.element_size() + 2
    assert_same(packed.to_dense(), weight)
    mask = torch.tensor([1, 1, 0, 0, 0], dtype=torch.bool)[None, :, None, None].expand(weight.shape)
    assert sk.pack_conv24(weight, mask).values.tolist() == [[[0, 1, 5], [0, 3, 6]]]  # a tail is kept whole


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_convolution_literal(simd, dtype):
    weight = torch.zeros(1, 4, 2, 2, dtype=dtype)
    weight[0, 0, 0, 0], weight[0, 3, 1, 1] = 1, 10
    x = torch.zeros(1, 4, 3, 3, dtype=dtype)
    x[0, 0], x[0, 3] = (torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]]) * factor for factor in (1, -1))
    packed = sk.pack_conv24(weight)
    assert sk.conv2d24(x, packed).tolist() == [[[[-49, -58], [-76, -85]]]]
    assert sk.conv2d24(x[0], packed, torch.tensor([1], dtype=dtype), stride=2).tolist() == [[[-48]]]
    assert sk.conv2d24(x, packed, None, 2, 1).tolist() == [[[[-10, -30], [-70, -85]]]]
    assert sk.conv2d24(x, packed, dilation=(1, 2)).tolist() == [[[[-59], [-86]]]]
    assert sk.conv2d24(x, packed, padding="same").tolist() == [[[[-49, -58, 3], [-76, -85, 6], [7, 8, 9]]]]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 3)], ids=str)
def test_convolution(simd, dtype, geometry, kernel):
    for images, outputs, inputs, height, width in [(1, 5, 4, 9, 7), (2, 17, 13, 6, 17), (1, 33, 104, 5, 9)]:
        weight, mask = sparse_conv24(outputs, inputs, *kernel, dtype)
        x, bias = torch.randn(images, inputs, height, width).to(dtype), torch.randn(outputs).to(dtype)
        packed = sk.pack_conv24(weight, mask)
        poison(x.new_empty(images, outputs, height, width))
        assert_convolution(sk.conv2d24(x, packed, bias, *geometry), x, weight, bias, *geometry)
        assert_convolution(sk.conv2d24(x[0], packed, None, *geometry), x[0], weight, None, *geometry)


@pytest.mark.parametrize("images, outputs, inputs", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
def test_convolution_without_images_or_channels(simd, images, outputs, inputs):
    packed, bias = sk.pack_conv24(torch.zeros(outputs, inputs, 3, 3)), torch.randn(outputs)
    x, expected = torch.randn(images, inputs, 5, 6), bias[:, None, None].expand(images, outputs, 5, 6)
    assert_same(sk.conv2d24(x, packed, bias, padding=1), expected.contiguous())
    assert_same(sk.conv2d24(x, packed, padding=1), torch.zeros_like(expected).contiguous())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_convolution_does_not_swallow_nan(simd, value):
    weight, mask = sparse_conv24(40, 12)
    x = torch.randn(3, 12, 6, 7)
    x[1, 5, 3, 3] = value
    y = sk.conv2d24(x, sk.pack_conv24(weight, mask), padding=1)
    reached = y[1, :, 2:5, 2:5].clone()
    taps = mask[:, 5].flip(-1, -2)  # the output above and left of an input meets it at the last tap
    assert reached[~taps].isnan().all() and not reached.isfinite().any()
    y[1, :, 2:5, 2:5] = 0
    assert y.isfinite().all()


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 6e-2), (torch.float16, 1e-2)], ids=dtype_id
)
@pytest.mark.parametrize("geometry", [(1, 1, 1), ((2, 1), 0, (1, 2))], ids=str)
def test_gradients(dtype, tolerance, geometry):
    packed = sk.pack_conv24(*sparse_conv24(6, 10, dtype=dtype))
    x, bias = torch.randn(2, 10, 7, 8).to(dtype), torch.randn(6).to(dtype)
    y = sk.conv2d24(x, packed, bias, *geometry)
    assert_equal_gradients(
        lambda x, values, bias: sk.conv2d24(x, packed._replace(values=values), bias, *geometry),
        lambda x, values, bias: F.conv2d(x, packed._replace(values=values).to_dense(), bias, *geometry),
        (x, packed.values, bias), torch.randn_like(y), rtol=tolerance, atol=tolerance,
    )  # fmt: skip


def test_gradient_of_packing():
    weight, mask = sparse_conv24(5, 14)
    weight.requires_grad_()
    packed = sk.pack_conv24(weight, mask)
    (packed.values * 2).sum().backward()
    assert torch.equal(weight.grad, 2.0 * mask)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_any_strides(simd, layout, dtype):
    weight, mask = sparse_conv24(7, 20, dtype=dtype)
    packed, x = sk.pack_conv24(weight, mask), torch.randn(2, 20, 6, 9).to(dtype)
    strided = sk.pack_conv24(LAYOUTS[layout](weight), LAYOUTS[layout](mask))
    assert_same(strided.values, packed.values)
    assert_same(strided.bitmask, packed.bitmask)
    strided = packed._replace(values=LAYOUTS[layout](packed.values), bitmask=LAYOUTS[layout](packed.bitmask))
    assert_same(strided.to_dense(), weight)
    expected = sk.conv2d24(x, packed, padding=1)
    assert_same(sk.conv2d24(LAYOUTS[layout](x), strided, padding=1), expected)
    assert_same(sk.conv2d24(x.contiguous(memory_format=torch.channels_last), packed, padding=1), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_threads_and_batches(simd, threads, dtype):
    packed = sk.pack_conv24(*sparse_conv24(70, 66, dtype=dtype))
    for size in (4, 19):
        x = torch.randn(9, 66, size, size).to(dtype)
        assert_same_for_any_threads(lambda x: sk.conv2d24(x, packed, padding=1), x, threads)
        assert_same_in_any_batch(lambda x: sk.conv2d24(x, packed, padding=1), x, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_opcheck(dtype):
    packed = sk.pack_conv24(*sparse_conv24(5, 6, dtype=dtype))
    x, bias = torch.randn(2, 6, 5, 6).to(dtype).requires_grad_(), torch.randn(5).to(dtype).requires_grad_()
    geometry = ([3, 3], [1, 2], [1, 0], [1, 1])
    opcheck(OPS.conv2d24.default, (x, packed.values.clone().requires_grad_(), packed.bitmask, bias, *geometry))
    opcheck(OPS.conv2d24.default, (x.detach(), packed.values, packed.bitmask, None, *geometry))


def test_compile_fullgraph():
    def run(x, packed, bias):
        return sk.conv2d24(x * 2, packed, bias, padding="same") + 1, packed.to_dense()

    arguments = torch.randn(2, 6, 5, 5), sk.pack_conv24(*sparse_conv24(5, 6)), torch.randn(5)
    outputs = torch.compile(run, fullgraph=True, backend="aot_eager")(*arguments)
    for got, expected in zip(outputs, run(*arguments), strict=True):
        assert torch.equal(got, expected)


def test_reference_computes_in_fp32():
    packed = sk.pack_conv24(*sparse_conv24(4, 8, dtype=torch.bfloat16))
    x = torch.randn(1, 8, 6, 6).bfloat16()
    exact = F.conv2d(x.float(), packed.to_dense().float(), None, 1, 1).bfloat16()
    assert torch.equal(conv2d24_reference(x, *packed[:2], None, [3, 3], [1, 1], [1, 1], [1, 1]), exact)


def test_a_packed_weight_moves_as_a_whole():
    packed = sk.pack_conv24(*sparse_conv24(6, 22))
    moved = packed.to("meta")
    assert moved.values.is_meta and moved.bitmask.is_meta and moved.shape == packed.shape
    assert moved.to_dense().shape == (6, 22, 3, 3) and packed.to("cpu").values is packed.values


def test_names_the_first_bad_group():
    weight, mask = sparse_conv24(4, 10)
    weight[2, 4:7, 1, 2], mask[2, 4:8, 1, 2] = 1, True
    weight[2, 7, 1, 2] = 0
    where = r"pack_conv24: output channel 2, input channels 4 to 7, tap \(1, 2\) have"
    with pytest.raises(ValueError, match=where + " 3 non-zeros; 2:4 needs at most 2"):
        sk.pack_conv24(weight)
    with pytest.raises(ValueError, match=where + " 4 set mask entries; 2:4 needs exactly 2"):
        sk.pack_conv24(weight, mask)
    sk.pack_conv24(weight, mask, check=False)


W = sk.pack_conv24(torch.zeros(3, 8, 3, 3))
X = torch.ones(2, 8, 5, 5)


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: sk.pack_conv24(torch.ones(3, 8)), ValueError, r"weight must have 4 dimensions, got shape \(3, 8\)"),
        (lambda: sk.pack_conv24(torch.ones(3, 8, 1, 1).long()), TypeError, r"weight must be float32"),
        (lambda: sk.pack_conv24(torch.ones(3, 8, 1, 1), torch.ones(3, 8) > 0), ValueError, r"mask must have shape"),
        (lambda: sk.conv2d24(X.long(), W), TypeError, r"x must be float32, .* got torch\.int64"),
        (lambda: sk.conv2d24(X[0, 0], W), ValueError, r"x must have shape \[images, 8, .* got \(5, 5\)"),
        (lambda: sk.conv2d24(X[:, :7], W), ValueError, r"x must have shape \[images, 8, .* got \(2, 7, 5, 5\)"),
        (lambda: sk.conv2d24(X, tuple(W)), TypeError, r"packed must be a PackedConv24, .* got tuple"),
        (lambda: sk.conv2d24(X, W._replace(shape=(3, 8))), ValueError, r"packed\.shape must be \[out, in, height"),
        (lambda: sk.conv2d24(X, W._replace(shape=(3, 8, 3, 1))), ValueError, r"values must have shape \(3, 3, 4\)"),
        (lambda: sk.conv2d24(X, W._replace(bitmask=W.bitmask.int())), TypeError, r"bitmask must be torch\.uint8"),
        (lambda: sk.conv2d24(X.half(), W), TypeError, r"values must be torch\.float16, got"),
        (lambda: sk.conv2d24(X.to("meta"), W), ValueError, r"values must be on meta, got cpu"),
        (lambda: sk.conv2d24(X, W, torch.ones(4)), ValueError, r"bias must have shape \(3,\), got"),
        (lambda: sk.conv2d24(X, W, stride=0), ValueError, r"stride must be one or two numbers of at least 1, got 0"),
        (lambda: sk.conv2d24(X, W, padding=(1, 1, 1)), ValueError, r"padding must be one or two numbers of at least 0"),
        (lambda: sk.conv2d24(X, W, dilation=1.5), TypeError, r"dilation must be one or two numbers, got 1\.5"),
        (lambda: sk.conv2d24(X, W, dilation=(1, 1.5)), TypeError, r"dilation must be an int, got 1\.5"),
        (lambda: sk.conv2d24(X, W, padding="full"), ValueError, r'padding must be "valid", "same" or numbers, got'),
        (lambda: sk.conv2d24(X, W, None, 2, "same"), ValueError, r'padding="same" needs a stride of 1, got \(2, 2\)'),
        (lambda: sk.conv2d24(X, W, dilation=3), ValueError, r"x must be at least as large as the kernel, \(3, 3\)"),
    ],
)  # fmt: skip
def test_rejects(call, error, match):
    with pytest.raises(error, match=match):
        call()
