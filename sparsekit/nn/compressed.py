"""What the layers of this package are, taken together."""

from torch import nn

from .linear24 import Linear24
from .prepacked import PrepackedLinear
from .tiered import TieredLinear

Compressed = Linear24 | PrepackedLinear | TieredLinear


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """The shape of ``layer.weight``, of a compressed layer without unpacking it."""
    if isinstance(layer, Compressed):
        shape = (layer.out_features, layer.in_features)
        return shape[::-1] if layer.transposed else shape
    return tuple(layer.weight.shape)  # type: ignore[arg-type]
