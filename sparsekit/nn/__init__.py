"""Compressed layers: packed tensors and one op call."""

from .arranged24 import ArrangedLinear24
from .arranged_conv24 import ArrangedConv2d24
from .compressed import Compressed
from .compressed_conv import CompressedConv2d
from .compressed_linear import CompressedLinear
from .conv24 import Conv2d24
from .int8 import Int8Linear
from .linear24 import Linear24
from .nf4 import Nf4Linear
from .prepacked_conv import PrepackedConv2d
from .prepacked_linear import PrepackedLinear
from .quantized24 import QuantizedLinear24
from .routed import Plan, Route, Routed, RoutedTieredLinear
from .routed24 import RoutedLinear24
from .tiered import TieredLinear
from .weight_view import WeightView

__all__ = [
    "ArrangedConv2d24",
    "ArrangedLinear24",
    "Compressed",
    "CompressedConv2d",
    "CompressedLinear",
    "Conv2d24",
    "Int8Linear",
    "Linear24",
    "Nf4Linear",
    "Plan",
    "PrepackedConv2d",
    "PrepackedLinear",
    "QuantizedLinear24",
    "Route",
    "Routed",
    "RoutedLinear24",
    "RoutedTieredLinear",
    "TieredLinear",
    "WeightView",
]
