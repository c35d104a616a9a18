"""Every kind of compressed linear layer, and how to make one; `convolutions` has those of convolutions."""

import pytest
import torch.nn.functional as F
from helpers import sparse_linear
from tiering import tiered_linear
from torch import nn

from sparsekit.nn import (
    ArrangedLinear24,
    Int8Linear,
    Linear24,
    Nf4Linear,
    Plan,
    PrepackedLinear,
    QuantizedLinear24,
    Route,
    RoutedLinear24,
    RoutedTieredLinear,
    TieredLinear,
)
from sparsekit.ops import int8_linear


class WithoutPlan(RoutedLinear24):
    """A routed layer that follows no plan."""


class InputPairs(ArrangedLinear24):
    """An arranged layer whose layout need not be named."""

    name_in_errors = "ArrangedLinear24"

    @classmethod
    def from_linear(cls, linear, *, layout="input pairs", transposed=False):
        return super().from_linear(linear, layout=layout, transposed=transposed)


class RowPairs(InputPairs):
    """The same in the other layout."""

    @classmethod
    def from_linear(cls, linear, *, layout="row pairs", transposed=False):
        return super().from_linear(linear, layout=layout, transposed=transposed)


class FloatInputs(QuantizedLinear24):
    """A quantized layer that does not round its inputs."""

    name_in_errors = "QuantizedLinear24"

    @classmethod
    def from_linear(cls, linear, *, transposed=False):
        return super().from_linear(linear, inputs="float", transposed=transposed)


class Rounding(nn.Linear):
    """The dense layer that a lossy one computes: its rounded weight, and rounded inputs, with gradients as without."""

    def __init__(self, layer, largest):
        super().__init__(layer.in_features, layer.out_features)
        self.load_state_dict(layer.to_linear().state_dict())
        self.largest = largest

    def forward(self, input):
        if self.largest and input.is_floating_point():
            dense = (input.to_dense() if input.is_sparse else input).float()
            step = dense.detach().abs().amax(-1, keepdim=True) / self.largest
            input = (dense + ((dense / step).round() * step - dense).detach()).to(input.dtype)
        return super().forward(input)


KINDS = {"linear24": Linear24, "tiered": TieredLinear, "prepacked": PrepackedLinear}
KINDS |= {"input pairs": InputPairs, "row pairs": RowPairs}
KINDS |= {"quantized": QuantizedLinear24, "float inputs": FloatInputs, "int8": Int8Linear, "nf4": Nf4Linear}
LARGEST_INPUT = {
    QuantizedLinear24: 127,
    FloatInputs: 0,
    Nf4Linear: 0,
    Int8Linear: int8_linear.LARGEST_INPUT.get(int8_linear.engine(), 0),
}  # of the integers that inputs are rounded to
ALL = KINDS | {"without plan": WithoutPlan, "24 routed": RoutedLinear24, "tiered routed": RoutedTieredLinear}
DENSE = (RoutedLinear24, RoutedTieredLinear)
PLAN = Plan((Route(8, "sparse"), Route(16, "dense")))
EACH = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
EVERY = pytest.mark.parametrize("kind", ALL.values(), ids=ALL)
SPARSE = pytest.mark.parametrize("kind", [Linear24, TieredLinear])
compiles = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # by torch itself, which uses torch.jit


def make(kind):
    """Returns a compressed layer of 80 inputs and 96 outputs, and the dense layer that computes the same."""
    linear = tiered_linear().eval() if issubclass(kind, TieredLinear) else sparse_linear(80, 96)
    layer = kind.from_linear(linear)
    if kind in LARGEST_INPUT:
        return layer, Rounding(layer, LARGEST_INPUT[kind]).eval()
    return (layer.follow(PLAN) if kind in DENSE else layer), linear


class Reads(nn.Module):
    """A module that multiplies by the weight of a layer without calling it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return F.linear(x, self.layer.weight, self.layer.bias)
