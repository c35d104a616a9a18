"""Rebuilds a model from the contents of a file: replaces layers by those of the right kind, and assigns tensors."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from .._replace import check_original_known, check_replaceable, guard_saving, restored_layer
from .._state import get_original, set_original
from ..masks import remove_mask, set_mask_bits
from ..nn import (
    ArrangedConv2d24,
    ArrangedLinear24,
    Compressed,
    CompressedConv2d,
    CompressedLinear,
    Conv2d24,
    Int8Linear,
    Linear24,
    Nf4Linear,
    PrepackedConv2d,
    PrepackedLinear,
    QuantizedLinear24,
    Routed,
    RoutedLinear24,
    RoutedTieredLinear,
    TieredLinear,
)
from ..nn.arranged import Arranged
from ..ops import Packed24
from ..ops.int8_linear import PackedInt8
from .mask_file import remove_masks
from .structure import CONVOLUTIONS, PARTS, LayerRecord, join


def rebuild(model: nn.Module, layers: Mapping[str, LayerRecord], tensors: Mapping[str, Tensor]) -> None:
    """Replaces every layer that has another kind in the file, and assigns all tensors.

    Args:
        model: its layers have the shapes of ``layers``.
        layers: the compressed or pruned layers by name, verified against ``tensors``.
        tensors: the state dict and the masks, each name with its tensor.

    Raises:
        ValueError: the file does not fit the model, which may be half changed then.
    """
    _replace_layers(model, layers, tensors)
    _assign(model, layers, tensors)
    _check_all_is_here(model)
    guard_saving(model)


def _replace_layers(model: nn.Module, layers: Mapping[str, LayerRecord], tensors: Mapping[str, Tensor]) -> None:
    """Replaces every layer that has another kind in the file."""
    made: dict[nn.Module, nn.Module] = {}
    make: Callable[[], nn.Module]
    for name, module in list(model.named_modules(remove_duplicate=False)):
        layer = layers.get(name)
        if layer is not None and layer.kind != "dense":
            make = partial(compressed_layer, name, module, layer, tensors)
        elif isinstance(module, Compressed):
            make = partial(_dense, name, module)
        else:
            continue
        if not name:
            raise ValueError("the model is a single layer, which cannot be replaced within it: put it in a Sequential")
        if module not in made:
            check_replaceable(name, module)
            made[module] = make()
        model.set_submodule(name, made[module])


def _dense(name: str, module: Compressed) -> nn.Module:
    check_original_known(name, module)
    return restored_layer(module)


def _can_hold(module: nn.Module, layer: LayerRecord) -> bool:
    """Returns whether a compressed layer of a file can take the place of ``module``."""
    if layer.kind in CONVOLUTIONS:
        simple = isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros"
        return simple or isinstance(module, CompressedConv2d)
    return isinstance(module, CompressedLinear) or (
        not isinstance(module, nn.Conv2d)
        and isinstance(module, nn.Linear) is not layer.transposed
        and isinstance(module._parameters.get("weight"), Tensor)
        and hasattr(module, "bias")
    )


def compressed_layer(
    name: str,
    module: nn.Module,
    layer: LayerRecord,
    tensors: Mapping[str, Tensor],
    device: torch.device | None = None,
) -> Compressed:
    """Returns the compressed layer that replaces ``module``; frees the memory of the weight if ``module`` is dense.

    It is made on ``device``; None is that of ``module``, or the CPU instead of the meta device.
    """
    if not _can_hold(module, layer):
        raise ValueError(f"layer {name!r} is {layer.kind!r} in the file and {type(module).__name__} in the model")
    device, trainable = device or _device(_stored(module)), _is_trainable(module)
    plan = module.plan if isinstance(module, Routed) else None
    if plan is not None and plan.layout is not None and layer.kind != "linear24":
        plan = None  # tensor cores multiply the packed 2:4 weight only
    new: Compressed
    if layer.kind == "linear24":
        rows, cols = layer.matrix
        values, bitmask = (part.to(device) for part in layer.parts(name, tensors))
        own = nn.Parameter(values, requires_grad=trainable)
        if layer.layout is not None and plan is None and device.type == "cpu":
            packed24 = Packed24(own, bitmask, layer.matrix)
            new = ArrangedLinear24(packed24, layout=layer.layout, transposed=layer.transposed)
        else:
            kind = Linear24 if plan is None else RoutedLinear24
            new = kind(cols, rows, False, transposed=layer.transposed, device="meta", dtype=values.dtype)
            new.values, new.bitmask = own, bitmask
    elif layer.kind == "tiered":
        packed = layer.tiered(name, tensors).to(device)
        tiered = TieredLinear if plan is None else RoutedTieredLinear
        new = tiered(packed, transposed=layer.transposed, requires_grad=trainable)
    elif layer.rounding is not None:
        if layer.kind == "int8":
            parts = [part.to(device) for part in layer.parts(name, tensors)]
            new = Int8Linear(PackedInt8(*parts), dtype=layer.rounding.dtype, transposed=layer.transposed)
        elif layer.kind == "nf4":
            new = Nf4Linear(layer.nf4(name, tensors).to(device), transposed=layer.transposed)
        else:
            quantized = layer.quantized(name, tensors).to(device)
            new = QuantizedLinear24(quantized, inputs=layer.rounding.inputs, transposed=layer.transposed)
        new.frozen = trainable
    elif isinstance(module, nn.Conv2d | CompressedConv2d):
        if layer.kind == "conv24":
            packed_conv = layer.convolution24(name, tensors).to(device)
            own = nn.Parameter(packed_conv.values, requires_grad=trainable)
            convolution = Conv2d24 if layer.layout is None or device.type != "cpu" else ArrangedConv2d24
            new = convolution.of(packed_conv._replace(values=own), module)
        else:
            assert layer.images is not None
            new = PrepackedConv2d(tensors[join(name, "weight")].to(device), module, layer.images)
            new.frozen = trainable
    else:
        weight = tensors[join(name, "weight")].to(device)
        weight = nn.Parameter(weight.t() if layer.transposed else weight, requires_grad=trainable)
        new = PrepackedLinear(weight, None, tokens=layer.tokens, transposed=layer.transposed)
    if isinstance(new, Routed) and plan is not None:
        new.follow(plan)
    new.bias = module.bias  # type: ignore[assignment]
    original = get_original(module) if isinstance(module, Compressed) else module
    if original is module:
        empty = _stored(module).detach().new_empty(0, device=device)
        module.weight = nn.Parameter(empty, requires_grad=trainable)
        remove_mask(module)
    if original is not None:
        set_original(new, original)
    return new.train(module.training)


def _assign(model: nn.Module, layers: Mapping[str, LayerRecord], tensors: Mapping[str, Tensor]) -> None:
    """Assigns its tensor to every parameter, buffer and mask.

    Each stored tensor becomes one object, so that the tensors which were shared in the saved model are shared again.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    state = dict(tensors)
    masks = {name: state.pop(layer.mask_name(name)) for name, layer in layers.items() if layer.mask}
    current = model.state_dict()
    _check_names(set(current), set(state))
    for key, tensor in current.items():
        if tensor.shape != state[key].shape:
            raise ValueError(f"{key} has shape {tuple(state[key].shape)}, the model's {tuple(tensor.shape)}")
        if tensor.is_floating_point() is not state[key].is_floating_point():
            raise ValueError(f"{key} is {state[key].dtype}, the model's {tensor.dtype}")
    for name, layer in layers.items():
        rearranged = layer.rounding is not None or isinstance(modules.get(name), Arranged)
        held = ("weight",) if layer.kind in ("prepacked", "prepacked_conv") else PARTS[layer.kind] if rearranged else ()
        for part in held:  # the layer holds them already, in another order
            del state[join(name, part)]
    parameters = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    objects: dict[tuple[int, bool, torch.device], Tensor] = {}

    def placed(tensor: Tensor, device: torch.device, parameter: bool) -> Tensor:
        key = (id(tensor), parameter, device)
        if key not in objects:
            moved = tensor.to(device)
            objects[key] = nn.Parameter(moved, requires_grad=False) if parameter else moved
        return objects[key]

    own = {key: placed(tensor, _device(current[key]), key in parameters) for key, tensor in state.items()}
    model.load_state_dict(own, strict=False, assign=True)
    remove_masks(modules.values())
    for name, bits in masks.items():
        layer, module = layers[name], modules[layers[name].module_name(name)]
        if layer.mask is not None:
            device = _device(_stored(module, layer.parameter))
            set_mask_bits(module, placed(bits, device, False), layer.mask, layer.parameter)


def _check_all_is_here(model: nn.Module) -> None:
    """Rejects a model with tensors that are still on the meta device, which would fail later, far from the cause."""
    left = [name for name, tensor in model.named_buffers(remove_duplicate=False) if tensor.is_meta]
    for name, module in model.named_modules(remove_duplicate=False):
        left += [join(name, key) for key, value in vars(module).items() if isinstance(value, Tensor) and value.is_meta]
    if left:
        raise ValueError(
            f"{', '.join(left[:3])}{f' and {len(left) - 3} more' if len(left) > 3 else ''} would stay on the meta "
            "device, since no state dict has it: make the model on the CPU, or its buffers there, as "
            "accelerate.init_empty_weights() does"
        )


def _check_names(model: set[str], file: set[str]) -> None:
    wrong = [
        f"{what} {', '.join(sorted(names)[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
        for what, names in (("missing", model - file), ("unexpected", file - model))
        if names
    ]
    if wrong:
        raise ValueError(f"it does not fit the model: {'; '.join(wrong)}")


def _stored(module: nn.Module, parameter: str = "weight") -> Tensor:
    """Returns a tensor in which the layer stores its weight."""
    return module._parts()[0] if isinstance(module, Compressed) else module.get_parameter(parameter)


def _is_trainable(module: nn.Module) -> bool:
    return module.trainable if isinstance(module, Compressed) else _stored(module).requires_grad


def _device(tensor: Tensor) -> torch.device:
    """Returns the device for the tensor that replaces this one: the same, or the CPU instead of the meta device."""
    return torch.device("cpu") if tensor.is_meta else tensor.device
