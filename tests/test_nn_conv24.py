import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsekit as sk
from sparsekit.nn import Conv2d24


def pruned_conv(**options):
    conv = nn.Conv2d(10, 6, (3, 2), stride=(2, 1), padding=(1, 0), **options)
    sk.prune_(conv, sk.Magnitude("2:4"))
    return conv


def test_computes_what_the_dense_layer_does():
    conv = pruned_conv().eval()
    layer, x = Conv2d24.from_conv2d(conv), torch.randn(2, 10, 7, 8)
    torch.testing.assert_close(layer(x), conv(x))
    assert torch.equal(layer.weight, conv.weight) and layer.bias is conv.bias and not layer.training
    back = layer.to_conv2d()
    assert torch.equal(back.weight, conv.weight) and torch.equal(back(x), conv(x)) and not back.training
    assert "10, 6, kernel_size=(3, 2), stride=(2, 1), padding=(1, 0)" in repr(layer)


def test_trains_as_the_dense_layer_does():
    conv, x = pruned_conv(), torch.randn(2, 10, 7, 8)
    layer = Conv2d24.from_conv2d(conv)
    conv.bias, bias = nn.Parameter(conv.bias.detach().clone()), layer.bias
    layer(x).square().sum().backward()
    conv(x).square().sum().backward()
    torch.testing.assert_close(bias.grad, conv.bias.grad)
    kept = sk.pack_conv24(conv.weight.detach()).bitmask
    assert torch.equal(kept, layer.bitmask)
    dense = layer.packed._replace(values=layer.values.grad).to_dense()
    torch.testing.assert_close(dense, conv.weight.grad * (layer.weight != 0), rtol=1e-4, atol=1e-4)


def test_copies_and_states():
    layer, other, x = Conv2d24(8, 4, 3), Conv2d24(8, 4, 3), torch.randn(1, 8, 5, 5)
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), expected) and set(layer.state_dict()) == {"values", "bitmask", "bias"}
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.bitmask.dtype == torch.uint8 and half(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), half(x.bfloat16()))


def test_a_new_layer_is_24_and_needs_no_mask():
    layer = Conv2d24(12, 5, 3, padding="same", bias=False)
    assert (layer.weight.unflatten(1, (3, 4)) != 0).sum(2).eq(2).all() and layer.bias is None
    x = torch.randn(2, 12, 6, 6)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, padding=1))
    bare = nn.Conv2d(12, 5, 3, bias=False)
    bare.weight = nn.Parameter(layer.weight.detach())
    assert torch.equal(Conv2d24.from_conv2d(bare).bitmask, layer.bitmask)


@pytest.mark.parametrize(
    "make, error, match",
    [
        (lambda: Conv2d24(4, 4, 1, dtype=torch.float64), TypeError, r"dtype must be float32, .* got torch\.float64"),
        (lambda: Conv2d24.from_conv2d(nn.Linear(4, 4)), TypeError, r"conv must be an nn\.Conv2d, got Linear"),
        (lambda: Conv2d24.from_conv2d(nn.Conv2d(8, 8, 3, groups=2)), ValueError, r"conv must have one group .* got 2"),
        (
            lambda: Conv2d24.from_conv2d(nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")),
            ValueError,
            r'padding_mode "zeros", got 1 and "reflect"',
        ),
        (lambda: Conv2d24.from_conv2d(nn.Conv2d(8, 8, 3)), ValueError, r"have 4 non-zeros; 2:4 needs at most 2"),
    ],
)
def test_rejects(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize("change", [torch.zeros_like, lambda bits: bits | 7, lambda bits: bits.int()])
def test_a_malformed_bitmask_is_refused_and_nothing_changes(change):
    layer = sk.nn.Conv2d24(8, 4, 3)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match="bitmask must"):
        layer.load_state_dict(before | {"values": before["values"] + 1, "bitmask": change(before["bitmask"])})
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
