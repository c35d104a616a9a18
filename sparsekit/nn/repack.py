"""What a layer keeps of its weight, and how a compressed one takes other numbers in the same form."""

import torch
from torch import Tensor, nn

from ..masks import MaskInfo, Pattern, get_mask, get_mask_bits, get_mask_info, set_mask
from ..ops.bits import nonzero
from .compressed import Compressed
from .linear24 import Linear24
from .prepacked import PrepackedLinear
from .shared import oriented
from .tiered import TieredLinear


def drops(layer: nn.Module) -> bool:
    """Whether a layer keeps only some entries of its weight."""
    return get_mask_bits(layer) is not None or isinstance(layer, Linear24 | TieredLinear)


def kept_entries(layer: nn.Module) -> Tensor | None:
    """Which entries of its weight a layer keeps, bool in the weight's shape; None where it keeps all."""
    mask = get_mask(layer)
    if mask is not None or not drops(layer):
        return mask
    if isinstance(layer, Linear24):
        return oriented(layer._unpack(torch.ones_like(layer.values), layer.bitmask) != 0, layer.transposed)
    return nonzero(dense_weight(layer))  # which is what TieredLinear packs of a weight without a mask


def dense_weight(layer: nn.Module) -> Tensor:
    """The weight of a layer as a dense tensor, without a gradient."""
    if isinstance(layer, Compressed):
        return oriented(layer._dense(), layer.transposed)
    return layer.get_parameter("weight").detach()


def store_weight(layer: Compressed, weight: Tensor) -> None:
    """Stores another dense weight in a compressed layer, in the same form: its zeros are those of the layer.

    Args:
        layer: keeps its tensors, which get new values.
        weight: in the shape of ``layer.weight``.
    """
    state = {"weight": weight}
    if not isinstance(layer, PrepackedLinear):
        mask = kept_entries(layer)
        assert mask is not None
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(oriented(weight, layer.transposed))
        set_mask(linear, oriented(mask, layer.transposed), get_mask_info(layer) or MaskInfo(Pattern(2, 4), 1))
        if isinstance(layer, TieredLinear):
            state = TieredLinear.from_linear(linear, k=layer.k, block=layer.block).state_dict()
        else:
            state = Linear24.from_linear(linear).state_dict()
    if layer.bias is not None:
        state["bias"] = layer.bias
    layer.load_state_dict(state)
