"""Compressed linear layers: packed tensors and one op call."""

from .compressed import Compressed as Compressed
from .compressed import weight_shape as weight_shape
from .dense_route import DenseRoute as DenseRoute
from .dense_route import Linear24WithDense as Linear24WithDense
from .dense_route import Routes as Routes
from .dense_route import TieredLinearWithDense as TieredLinearWithDense
from .guard import guard_conversions as guard_conversions
from .linear24 import Linear24 as Linear24
from .prepacked import PrepackedLinear as PrepackedLinear
from .routed import Plan as Plan
from .routed import Route as Route
from .routed import RoutedLinear24 as RoutedLinear24
from .shared import autocast_dtype as autocast_dtype
from .shared import carry_mask as carry_mask
from .shared import fx_node as fx_node
from .tiered import TieredLinear as TieredLinear
from .weight import WeightView as WeightView
