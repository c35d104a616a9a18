"""ArrangedLinear24: what it computes, stores and refuses."""

import copy
import pickle

import pytest
import torch
from helpers import sparse_linear

from sparsekit.nn import ArrangedLinear24

EVERY = pytest.mark.parametrize("layout", ["input pairs", "row pairs"])


@EVERY
def test_it_computes_the_same_and_keeps_the_weight(layout):
    linear, x = sparse_linear(83, 96), torch.randn(20, 83)
    layer = ArrangedLinear24.from_linear(linear, layout=layout)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), linear(x))
    torch.testing.assert_close(layer(x), linear(x))
    assert torch.equal(layer.weight + 0, linear.weight) and layer.bias is linear.bias


@EVERY
def test_copies_and_state(layout):
    layer, x = ArrangedLinear24.from_linear(sparse_linear(83, 96), layout=layout), torch.randn(20, 83)
    other = ArrangedLinear24.from_linear(sparse_linear(83, 96), layout=layout)
    state = layer.state_dict()
    assert set(state) == {"values", "bitmask", "bias"}
    other.load_state_dict(state)
    for each in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
        assert torch.equal(each(x), layer(x))
    with pytest.raises(RuntimeError, match=r'Missing key.*"values"'):
        layer.load_state_dict({"bias": layer.bias})


@EVERY
def test_conversions(layout):
    layer, x = ArrangedLinear24.from_linear(sparse_linear(83, 96), layout=layout), torch.randn(20, 83)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == half.weight.dtype == torch.bfloat16
    assert copy.deepcopy(layer).to("meta")(x.to("meta")).is_meta
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_it_refuses_to_train():
    layer = ArrangedLinear24.from_linear(sparse_linear().train(), layout="row pairs")
    with pytest.raises(RuntimeError, match=r"cannot train its weight: call model.eval\(\)"):
        layer(torch.randn(3, 40))
    with pytest.raises(ValueError, match=r"layout must be one of .* got 'rows'"):
        ArrangedLinear24(layer.packed, layout="rows")
