"""Compressed linear layers: packed tensors and one op call."""

from .common import autocast_dtype as autocast_dtype
from .common import carry_mask as carry_mask
from .common import fx_node as fx_node
from .compressed import Compressed as Compressed
from .compressed import weight_shape as weight_shape
from .conversion_guard import guard_conversions as guard_conversions
from .dense_route import DenseRoute as DenseRoute
from .dense_route import Linear24WithDense as Linear24WithDense
from .dense_route import Routes as Routes
from .dense_route import TieredLinearWithDense as TieredLinearWithDense
from .linear24 import Linear24 as Linear24
from .prepacked import PrepackedLinear as PrepackedLinear
from .routed24 import Plan as Plan
from .routed24 import Route as Route
from .routed24 import RoutedLinear24 as RoutedLinear24
from .tiered import TieredLinear as TieredLinear
from .weight_view import WeightView as WeightView
