"""Models from and to the files that llm-compressor wrote, whose packed 2:4 form is that of ``pack24``."""

from torch import Tensor, nn

from ..nn import Linear24, TieredLinear
from .bitmask import find_packed, shape_column, shape_of, unpack_bitmask
from .structure import Layer, join
from .tiered import PARTS


def to_bitmask24(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames the packed tensors of a state dict, and unpacks those that the format does not know.

    Raises:
        ValueError: a packed layer that the format has no place for, or none that it packs.
    """
    if not any(isinstance(layer, Linear24) for layer in model.modules()):
        raise ValueError("the model has no Linear24, which is what sparse-24-bitmask packs; compress it first")
    state, unpacked = dict(state), dict[nn.Module, Tensor]()
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, Linear24):
            if layer.transposed or layer.in_features % 4:
                form = "transposed" if layer.transposed else f"of {layer.in_features} inputs"
                raise ValueError(f"layer {name!r} is {form}; sparse-24-bitmask needs plain ones of a multiple of 4")
            state[join(name, "compressed")] = state.pop(join(name, "values"))
            state[join(name, "shape")] = shape_column(layer.out_features, layer.in_features)
        elif isinstance(layer, TieredLinear):
            for part in PARTS:
                del state[join(name, part)]
            if layer not in unpacked:
                unpacked[layer] = layer.weight.detach().clone()
            state[join(name, "weight")] = unpacked[layer]
    return state


def from_bitmask24(model: nn.Module, tensors: dict[str, Tensor]) -> tuple[dict[str, Layer], dict[str, str]]:
    """Renames the tensors back, in place; returns the layers with their masks, and which tensor every shared one is.

    Weights packed for any zeros (``sparse-bitmask``) are unpacked. Such files leave out all but one name of a shared
    tensor, so the model says what is shared.

    Raises:
        ValueError: no tensor is packed like that, or the parts of one do not belong together.
    """
    packed = find_packed(tensors)
    if not packed:
        raise ValueError("it is a safetensors file, but not one that sparsekit.save wrote")
    layers = {}
    for weight, names in packed.items():
        parts = {part: tensors.pop(name) for part, name in names.items()}
        name = weight.removesuffix("weight").removesuffix(".")
        if parts["compressed"].dim() != 2:
            tensors[weight] = unpack_bitmask(weight, parts)
            continue
        entry = {"kind": "linear24", "shape": list(shape_of(weight, parts)), "transposed": False, "tokens": 1}
        layers[name] = Layer.parse(name, {**entry, "mask": {"pattern": "2:4", "axis": 1}})
        tensors[join(name, "values")] = parts["compressed"]
        tensors[join(name, "bitmask")] = tensors[join(name, "weight_mask")] = parts["bitmask"]
    state = model.state_dict(keep_vars=True)
    stored = {id(state[name]): name for name in tensors if name in state}
    missing_names = [name for name in state if name not in tensors]
    return layers, {name: stored[id(state[name])] for name in missing_names if id(state[name]) in stored}
