"""Reads the weight and mask of a plain or compressed layer, and stores another weight in a compressed one."""

from torch import Tensor, nn

from ..masks import MaskInfo, Pattern, get_mask, get_mask_bits, get_mask_info, set_mask
from ..ops.bits import nonzero, unpack_bits
from .common import oriented
from .compressed import Compressed
from .compressed_linear import CompressedLinear
from .int8 import Int8Linear
from .linear24 import Linear24
from .nf4 import Nf4Linear
from .prepacked_linear import PrepackedLinear
from .quantized24 import QuantizedLinear24
from .tiered import TieredLinear


def is_sparse(layer: nn.Module) -> bool:
    """Returns whether a layer keeps only some entries of its weight."""
    return get_mask_bits(layer) is not None or (isinstance(layer, Compressed) and layer.sparse)


def kept_entries(layer: nn.Module) -> Tensor | None:
    """Returns which entries of its weight a layer keeps, bool in the weight's shape; None if it keeps all."""
    mask = get_mask(layer)
    if mask is not None or not is_sparse(layer):
        return mask
    if isinstance(layer, Linear24 | QuantizedLinear24):
        bits = layer.bitmask if isinstance(layer, Linear24) else layer.packed.bitmask
        return oriented(unpack_bits(bits, layer.in_features), layer.transposed)
    return nonzero(dense_weight(layer))  # TieredLinear packs the non-zeros of a weight without a mask


def dense_weight(layer: nn.Module) -> Tensor:
    """Returns the weight of a layer as a dense tensor, without a gradient."""
    if isinstance(layer, Compressed):
        return oriented(layer._dense(), layer.transposed)
    return layer.get_parameter("weight").detach()


def store_weight(layer: CompressedLinear, weight: Tensor) -> None:
    """Stores another weight in a compressed layer, in the layer's form and with its mask.

    Args:
        layer: gets new values in the tensors that it has.
        weight: a dense tensor of the shape of ``layer.weight``; entries that the layer does not keep are not stored.
    """
    state = {"weight": weight}
    if not isinstance(layer, PrepackedLinear):
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(oriented(weight, layer.transposed))
        if (mask := kept_entries(layer)) is not None:
            set_mask(linear, oriented(mask, layer.transposed), get_mask_info(layer) or MaskInfo(Pattern(2, 4), 1))
        state = _packed_like(layer, linear).state_dict()
    if layer.bias is not None:
        state["bias"] = layer.bias
    layer.load_state_dict(state)


def _packed_like(layer: CompressedLinear, linear: nn.Linear) -> CompressedLinear:
    """Returns a layer of the form of ``layer`` with another weight; a lossy one rounds it anew."""
    if isinstance(layer, TieredLinear):
        return TieredLinear.from_linear(linear, k=layer.k, block=layer.block)
    if isinstance(layer, QuantizedLinear24):
        return QuantizedLinear24.from_linear(linear, quant_type=layer.quant_type, group=layer.group, inputs="float")
    if isinstance(layer, Nf4Linear):
        return Nf4Linear.from_linear(linear, block=layer.block)
    return Int8Linear.from_linear(linear) if isinstance(layer, Int8Linear) else Linear24.from_linear(linear)
