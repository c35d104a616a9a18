"""Compressed linear layers: packed tensors and one op call."""

from .compressed import Compressed
from .dense_route import DenseRoute, Linear24WithDense, Routes, TieredLinearWithDense
from .linear24 import Linear24
from .prepacked import PrepackedLinear
from .routed24 import Plan, Route, RoutedLinear24
from .tiered import TieredLinear
from .weight_view import WeightView

__all__ = [
    "Compressed",
    "DenseRoute",
    "Linear24",
    "Linear24WithDense",
    "Plan",
    "PrepackedLinear",
    "Route",
    "RoutedLinear24",
    "Routes",
    "TieredLinear",
    "TieredLinearWithDense",
    "WeightView",
]
