"""ArrangedConv2d24: what it stores and refuses; `test_nn_prepacked_conv` has what all convolutions promise."""

import copy

import pytest
import torch
from convolutions import pruned_conv
from torch import nn

import sparsekit as sk
from sparsekit.nn import ArrangedConv2d24, Conv2d24
from sparsekit.ops import arranged_conv2d24, backends

COMPILED = pytest.mark.skipif(backends()["arranged_conv2d24"]["cpu"] == "reference", reason="needs the extension")
X = torch.randn(2, 12, 9, 8, generator=torch.Generator().manual_seed(0))


@COMPILED
def test_it_holds_the_arranged_weight_alone():
    conv = pruned_conv()
    layer, plain = ArrangedConv2d24.from_conv2d(conv), Conv2d24.from_conv2d(conv)
    assert [tensor.dtype for tensor in layer.resident_tensors() if len(tensor)] == [torch.uint8]
    assert torch.equal(layer.values, plain.values) and torch.equal(layer.bitmask, plain.bitmask)
    state, expected = layer.state_dict(), plain.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)
    assert torch.equal(layer.weight.clone(), conv.weight)


def test_the_states_of_both_kinds_are_exchanged():
    one, other = pruned_conv(), pruned_conv()
    layer, plain = ArrangedConv2d24.from_conv2d(one), Conv2d24.from_conv2d(other)
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(plain(X), layer(X))
    with pytest.raises(RuntimeError, match=r"bitmask must|bitmask does not|exactly two"):
        layer.load_state_dict(layer.state_dict() | {"bitmask": torch.zeros_like(layer.bitmask)})
    torch.testing.assert_close(layer(X), plain(X))


@pytest.mark.parametrize("inputs, dtype", [(10, torch.float32), (12, torch.bfloat16)])
def test_what_cannot_be_arranged_is_stored_packed(inputs, dtype):
    conv = pruned_conv(inputs).to(dtype)
    layer, x = ArrangedConv2d24.from_conv2d(conv), torch.randn(2, inputs, 9, 8).to(dtype)
    assert layer.arranged is None
    assert torch.equal(layer(x), Conv2d24.from_conv2d(conv)(x))


def test_conversions():
    layer = ArrangedConv2d24.from_conv2d(pruned_conv())
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.arranged is None and half(X.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(half.float().bitmask, layer.bitmask) and (half.arranged is None) == (layer.arranged is None)
    assert copy.deepcopy(layer).to("meta")(X.to("meta")).is_meta


def test_it_cannot_be_trained_and_comes_back_dense():
    conv = pruned_conv().train()
    layer = ArrangedConv2d24.from_conv2d(conv)
    with pytest.raises(RuntimeError, match="ArrangedConv2d24 cannot train its weight"):
        layer(X)
    back = layer.to_conv2d()
    assert type(back) is nn.Conv2d and torch.equal(back.weight, conv.weight) and back.weight.requires_grad
    assert sk.masks.get_mask(back) is not None


@COMPILED
@pytest.mark.parametrize("options", [{}, {"stride": (2, 1), "padding": (1, 0)}, {"padding": "same"}], ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # by F.conv2d
def test_a_call_without_gradients_goes_straight_to_the_kernel(options):
    conv = pruned_conv(**options)
    layer = ArrangedConv2d24.from_conv2d(conv)
    negated = torch.complex(X, X).conj().imag  # whose sign torch has yet to change
    with torch.no_grad():
        assert (layer._convolve_directly(X) is None) == (options == {"padding": "same"})
        for x in (X, X[:0], X[:, :, ::2], X.transpose(2, 3), negated, torch.nn.Parameter(X)):
            torch.testing.assert_close(layer(x), conv(x))
            assert torch.equal(
                layer(x), arranged_conv2d24(x, layer.arranged, conv.bias, layer.stride, layer.padding, layer.dilation)
            )
        with pytest.raises(ValueError, match=r"x must have shape \[images, 12, height"):
            layer(X[:, :8])
        if options != {"padding": "same"}:
            with pytest.raises(ValueError, match="at least as large as the kernel"):
                layer(X[:, :, :, :1] if not options else X[:, :, :0])
