"""Reads and writes files of only masks, a bit for each weight, for weights that another library stores."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from .._safetensors import check_holds_data, seal, write_tensors
from ..masks import MaskInfo, masked_parameters, remove_mask, set_mask_bits
from ..nn import Compressed
from .structure import LayerRecord, collect_records, dump_structure, join
from .verify import verify_mask


def collect_masks(model: nn.Module) -> tuple[dict[str, LayerRecord], dict[str, Tensor]]:
    """Returns the pruned layers of a model, and their masks.

    Raises:
        ValueError: it has no masks, or one that does not fit its weight any more.
    """
    layers, tensors = dict[str, LayerRecord](), dict[str, Tensor]()
    for name, layer, bits in collect_records(model):
        if bits is not None:
            layers[name] = LayerRecord("dense", layer.shape, mask=layer.mask, parameter=layer.parameter)
            tensors[layer.mask_name(name)] = bits
    if not layers:
        raise ValueError("the model has no masks to be saved")
    return layers, tensors


def save_masks(path: Path, masks: Mapping[str, tuple[Tensor, tuple[int, ...], MaskInfo]]) -> None:
    """Writes the masks of layers without a model; each is bit-packed, with the shape of its weight and its pattern.

    Raises:
        OSError: the file cannot be written.
    """
    layers = {name: LayerRecord("dense", shape, mask=info) for name, (_, shape, info) in masks.items()}
    tensors = {join(name, "weight_mask"): bits for name, (bits, _, _) in masks.items()}
    write_tensors(path, tensors, seal(dump_structure(layers, {}), tensors))


def holds_only_masks(layers: Mapping[str, LayerRecord], tensors: Mapping[str, Tensor]) -> bool:
    """Returns whether a file holds nothing but the masks of its layers."""
    masked = {layer.mask_name(name) for name, layer in layers.items() if layer.mask}
    return len(masked) == len(layers) > 0 and tensors.keys() == masked


def assign_masks(model: nn.Module, layers: Mapping[str, LayerRecord], tensors: Mapping[str, Tensor]) -> None:
    """Stores these masks in the layers of a dense model, and removes all other masks.

    Raises:
        ValueError: a layer is missing, compressed or of another shape, or has a non-zero weight that its mask drops.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, layer in layers.items():
        kept = verify_mask(name, layer, tensors)
        module = modules.get(layer.module_name(name))
        # A weight that is computed from others is not read, because reading may change them.
        weight = None if module is None or isinstance(module, Compressed) else module._parameters.get(layer.parameter)
        if weight is None:
            raise ValueError(f"the model has no dense layer {name!r} for its mask")
        check_holds_data(f"layer {name!r}", weight)
        if layer.shape != weight.shape:
            raise ValueError(f"layer {name!r} has shape {layer.shape}, the model's has {tuple(weight.shape)}")
        if weight.is_meta:
            raise ValueError(f"layer {name!r} is on the meta device: masks alone need a model that has its weights")
        if weight.detach()[~kept.view(weight.shape).to(weight.device)].any():
            raise ValueError(f"layer {name!r} has weights that its mask drops: these are not the weights it belongs to")
    remove_masks(modules.values())
    for name, layer in layers.items():
        module = modules[layer.module_name(name)]
        bits = tensors[layer.mask_name(name)].to(module.get_parameter(layer.parameter).device)
        assert layer.mask is not None
        set_mask_bits(module, bits, layer.mask, layer.parameter)


def remove_masks(modules: Iterable[nn.Module]) -> None:
    """Removes the stored masks of all parameters of modules."""
    for module in modules:
        for parameter in masked_parameters(module):
            remove_mask(module, parameter)
