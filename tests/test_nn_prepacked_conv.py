"""PrepackedConv2d, and what it has in common with the 2:4 convolutions: copies, states, conversions, compilation."""

import copy
import io
import pickle

import pytest
import torch
from convolutions import FORMS, pruned_conv
from torch import nn

from sparsekit.nn import Conv2d24, PrepackedConv2d

EACH = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
OPTIONS = [
    {},
    {"stride": (2, 1), "padding": (1, 0)},
    {"padding": "same", "dilation": 3},
    {"padding": "valid", "bias": False},
]
LAST = torch.channels_last
X = torch.randn(2, 12, 9, 8, generator=torch.Generator().manual_seed(0))


@EACH
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # by F.conv2d
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_computes_what_the_dense_layer_does(form, options):
    conv = pruned_conv(**options)
    layer = form.from_conv2d(conv)
    for x in (X, X.to(memory_format=LAST), X[1], X[:0], X[:, :, ::2], torch.randn(7, 12, 12, 13)):
        torch.testing.assert_close(layer(x), conv(x))
    assert torch.equal(layer.weight, conv.weight) and layer.bias is conv.bias
    back = layer.to_conv2d()
    assert torch.equal(back.weight, conv.weight) and torch.equal(back(X), conv(X)) and back.stride == conv.stride
    torch.testing.assert_close(layer.reference(X).float(), conv(X))


@pytest.mark.parametrize(
    "images",
    [X, X.to(memory_format=LAST), X.to(memory_format=LAST)[:, :, 1:, :5]],
    ids=["contiguous", "channels last", "cropped"],
)
@pytest.mark.parametrize("weights", [torch.contiguous_format, LAST], ids=str)
def test_the_memory_format_of_the_result_is_that_of_the_dense_layer(images, weights):
    conv = pruned_conv(padding=1).to(memory_format=weights)
    layer = PrepackedConv2d.from_conv2d(conv)
    assert layer(images).stride() == conv(images).stride()
    assert layer.weight.stride() == conv.weight.stride() == layer.to_conv2d().weight.stride()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(images).stride() == conv(images).stride()


def test_the_memory_format_of_a_single_channel_is_that_of_its_strides():
    conv = nn.Conv2d(1, 4, 3).eval()
    layer = PrepackedConv2d.from_conv2d(conv)
    for strides in ((12, 12, 4, 1), (12, 1, 4, 1)):
        x = torch.empty_strided((2, 1, 3, 4), strides).fill_(1)
        assert layer(x).stride() == conv(x).stride()


@EACH
def test_copies_states_and_conversions(form):
    conv = pruned_conv()
    layer, other = form.from_conv2d(conv), form.from_conv2d(pruned_conv())
    expected = layer(X)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(X), expected)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(X), expected)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    torch.testing.assert_close(half(X.bfloat16()).float(), expected, rtol=5e-2, atol=5e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(X).dtype == torch.bfloat16
    assert torch.equal(copy.deepcopy(layer).to(memory_format=LAST)(X), expected)


def test_only_what_computes_it_is_converted_to_float64():
    with pytest.raises(TypeError, match=r"Conv2d24 is compressed and computes in float32, .* not torch\.float64"):
        Conv2d24(8, 4, 3).double()
    conv = pruned_conv()
    double = PrepackedConv2d.from_conv2d(conv).double()
    torch.testing.assert_close(double(X.double()), copy.deepcopy(conv).double()(X.double()))
    assert not double.reordered and "weight=plain" in repr(double)


def test_the_state_is_a_dense_weight():
    conv = pruned_conv()
    layer = PrepackedConv2d.from_conv2d(conv)
    assert layer.state_dict().keys() == {"weight", "bias"} and torch.equal(layer.state_dict()["weight"], conv.weight)
    layer.load_state_dict({"weight": conv.weight * 2, "bias": conv.bias})
    assert torch.equal(layer.weight, conv.weight * 2)
    with pytest.raises(RuntimeError, match=r"weight must have shape \(6, 12, 3, 2\), got \(2, 3\)"):
        layer.load_state_dict({"weight": torch.ones(2, 3), "bias": conv.bias})


@EACH
def test_gradients_of_images_and_bias(form):
    conv = pruned_conv(padding=1)
    layer = form.from_conv2d(conv)
    grads = []
    for module in (conv, layer):
        x = X.clone().requires_grad_()
        conv.bias.grad = None
        module(x).square().sum().backward()
        grads.append((x.grad, conv.bias.grad))
    torch.testing.assert_close(grads[0], grads[1])


def test_it_cannot_be_trained():
    layer = PrepackedConv2d.from_conv2d(pruned_conv().train())
    with pytest.raises(RuntimeError, match="PrepackedConv2d cannot train its weight"):
        layer(X)
    with torch.no_grad():
        layer(X)
    assert layer.trainable and layer.to_conv2d().weight.requires_grad


@EACH
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_traced_and_transformed(form):
    conv = pruned_conv(padding=1)
    layer = form.from_conv2d(conv)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for x in (X, X.to(memory_format=LAST)):
            torch.testing.assert_close(compiled(x), conv(x))
            assert compiled(x).stride() == layer(x).stride()
    graph = torch.fx.symbolic_trace(nn.Sequential(layer))
    torch.testing.assert_close(graph(X), conv(X))
    torch.testing.assert_close(torch.func.vmap(layer)(X[:, None]), conv(X)[:, None])


@EACH
def test_rejects_images_that_do_not_fit(form):
    layer = form.from_conv2d(pruned_conv())
    for x, error, match in (
        (torch.randn(2, 9, 8, 8), ValueError, r"x must have shape \[images, 12, height, width\]"),
        (torch.randn(2, 12, 2, 8), ValueError, r"x must be at least as large as the kernel, \(3, 2\)"),
        (X.double(), TypeError, r"float64"),
        ([1.0], TypeError, "input must be a tensor, got list"),
    ):
        with pytest.raises(error, match=match):
            layer(x)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: nn.Linear(4, 4), TypeError, r"conv must be an nn\.Conv2d, got Linear"),
        (lambda: nn.Conv2d(8, 8, 3, groups=2), ValueError, r"conv must have one group .* got 2"),
    ],
)
def test_rejects(make, error, match):
    with pytest.raises(error, match=match):
        PrepackedConv2d.from_conv2d(make())
