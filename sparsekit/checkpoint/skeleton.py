"""Prepares a model without weights for a loader of another library, and makes its compressed layers afterwards."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .._replace import guard_saving
from .._state import get_original, remove_bits, set_original
from ..masks import set_mask_bits
from ..nn import Compressed
from .pretrained import stored_name
from .rebuild import compressed_layer
from .shards import Shards
from .structure import PARTS, LayerRecord, join, parts_of
from .verify import verify, verify_mask

FIXED = ("scales", "absmax")  # floating-point tensors whose dtype does not follow that of the model


class StoredLayer(nn.Module):
    """The stored tensors of a layer while a model is being loaded, in place of the layer and of its weight.

    Args:
        layer: the plain layer, on the meta device.
        record: what the layer becomes.
        tensors: on the meta device, which a loader replaces, by the names that they have in the folder.
    """

    bias: nn.Parameter | None

    def __init__(self, layer: nn.Module, record: LayerRecord, tensors: Mapping[str, Tensor]):
        super().__init__()
        set_original(self, layer)  # not registered, so that nobody allocates its weight
        self.record = record
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.register_parameter("bias", layer.bias)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Skeleton:
    """A model that is being loaded.

    Args:
        model: the model, with a ``StoredLayer`` in place of each compressed layer.
        layers: the compressed and pruned layers by the names that they have in the model.
        shared: for each mask that is not stored itself, the name of the tensor that holds the same bits.
    """

    model: nn.Module
    layers: Mapping[str, LayerRecord]
    shared: Mapping[str, str]

    @torch.inference_mode(False)
    @torch.no_grad()
    def finish(self) -> None:
        """Makes the layers of the tensors that were loaded, one after the other, and gives pruned layers their masks.

        Raises:
            ValueError: a tensor was not loaded, or is not what the layer needs.
        """
        modules = dict(self.model.named_modules(remove_duplicate=False))
        masks = {name: self._mask(name, record, modules) for name, record in self.layers.items() if record.mask}
        made: dict[nn.Module, Compressed] = {}
        for name, record in self.layers.items():
            module = modules[record.module_name(name)]
            if isinstance(module, StoredLayer):
                if "_hf_hook" in vars(module):
                    raise ValueError(
                        f"layer {name!r} would move between devices or to the disk, and compressed layers stay where "
                        "they are: give device_map one device"
                    )
                if module not in made:
                    made[module] = _finished(name, module, masks.get(name))
                    module._buffers.clear()  # the made layer may hold them in another order
                self.model.set_submodule(name, made[module])
                module = made[module]
            elif record.mask is not None:
                verify_mask(name, record, {record.mask_name(name): masks[name]})
                remove_bits(module, record.mask_name(name).rpartition(".")[2])
            if record.mask is not None:
                set_mask_bits(module, masks[name], record.mask, record.parameter)
        guard_saving(self.model)

    def _mask(self, name: str, record: LayerRecord, modules: Mapping[str, nn.Module]) -> Tensor:
        stored = record.mask_name(name)
        owner, _, part = self.shared.get(stored, stored).rpartition(".")
        bits = modules[owner]._buffers.get(part) if owner in modules else None
        if bits is None or bits.is_meta:
            raise ValueError(f"the tensor {stored!r} is missing")
        return bits


def prepare(model: nn.Module, layers: Mapping[str, LayerRecord], shared: Mapping[str, str], weights: Path) -> Skeleton:
    """Puts the stored tensors of each compressed layer in its place, on the meta device: nothing dense is allocated.

    A model whose names have another prefix than those of the saved one, as the base model of a classifier has, gets the
    layers that it has.

    Args:
        model: on the meta device.
        layers: the compressed and pruned layers, as ``config.json`` describes them.
        shared: as ``config.json`` has it.
        weights: the file that will be loaded, whose header is read.

    Raises:
        ValueError: the model has no such layers, or they have other shapes.
    """
    file, modules = Shards([weights]), dict(model.named_modules(remove_duplicate=False))
    rename = renaming(model, [record.module_name(name) for name, record in layers.items()])
    found = {name: rename(name) for name, record in layers.items() if record.module_name(rename(name)) in modules}
    if layers and not found:
        raise ValueError(f"it does not fit the model: there is no layer {min(layers)!r} in a {type(model).__name__}")
    made: dict[nn.Module, StoredLayer] = {}
    for stored, name in found.items():
        record = layers[stored]
        module = modules[record.module_name(name)]
        weight = module._parameters.get(record.parameter)
        if weight is None or tuple(weight.shape) != record.shape:
            shape = None if weight is None else tuple(weight.shape)
            raise ValueError(f"layer {name!r} has shape {record.shape}, the model's has {shape}")
        if record.kind != "dense":
            if module not in made:
                made[module] = _stored_layer(stored, module, record, weight.dtype, file)
            model.set_submodule(name, made[module])
            module = made[module]
        if record.mask is not None and record.mask_name(stored) not in shared:
            module.register_buffer(record.mask_name(name).rpartition(".")[2], file.meta(record.mask_name(stored)))
    own = {name: layers[stored] for stored, name in found.items()}
    return Skeleton(model, own, {rename(name): rename(source) for name, source in shared.items()})


def renaming(model: nn.Module, names: Iterable[str]) -> Callable[[str], str]:
    """Returns the function that turns names of the saved model, such as these of modules, into those of ``model``."""
    prefix, modules, names = getattr(model, "base_model_prefix", ""), dict(model.named_modules()), list(names)
    if not prefix or any(name in modules for name in names):
        return lambda name: name
    if any(name.removeprefix(f"{prefix}.") in modules for name in names):
        return lambda name: name.removeprefix(f"{prefix}.")
    return lambda name: f"{prefix}.{name}"


def _stored_layer(name: str, layer: nn.Module, record: LayerRecord, dtype: torch.dtype, file: Shards) -> StoredLayer:
    if record.rounding is not None:
        record = replace(record, rounding=replace(record.rounding, dtype=dtype))
    tensors = {}
    for part in parts_of(record):
        stored = stored_name(name, record, part)
        tensor = file.meta(stored)
        follows = tensor.is_floating_point() and part not in FIXED
        tensors[stored.rpartition(".")[2]] = tensor.to(dtype) if follows else tensor
    return StoredLayer(layer, record, tensors)


def _finished(name: str, module: StoredLayer, bits: Tensor | None) -> Compressed:
    """Returns the compressed layer, after a check of its tensors."""
    record, layer = module.record, get_original(module)
    assert layer is not None
    tensors = {} if bits is None else {record.mask_name(name): bits}
    for part in parts_of(record):
        stored = stored_name("", record, part)
        tensor = module._buffers[stored]
        if tensor is None or tensor.is_meta:
            raise ValueError(f"the tensor {join(name, stored)!r} is missing")
        tensors[join(name, part)] = tensor.squeeze(0) if record.kind in PARTS and stored == "weight" else tensor
    verify(name, record, tensors)
    layer.register_parameter("bias", module.bias)
    layer.train(module.training)
    return compressed_layer(name, layer, record, tensors, tensors[join(name, parts_of(record)[0])].device)
