"""Saves and loads a model with its masks and its compressed layers."""

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .._archive import read, seal, unique, write
from .._layers import check_model
from ..compress.swap import check_known, empty, get_original, guard_saving, refill, set_original
from ..masks import check_masks, remove_mask, set_mask_bits
from ..nn import Compressed, Linear24, PrepackedLinear, RoutedLinear24, TieredLinear, weight_shape
from ..ops import TieredWeight
from .bitmask24 import from_bitmask24, to_bitmask24
from .mask_file import assign_masks, masks_of, only_masks
from .shards import Shards
from .structure import Layer, dump, join, parse

Format = Literal["sparsekit", "sparse-24-bitmask", "masks"]


def save(model: nn.Module, path: str | os.PathLike[str], *, format: Format = "sparsekit") -> None:
    """Writes a model, with its masks and its compressed layers, to one safetensors file.

    The file holds the state dict, each shared tensor once; of a compressed layer what it is packed in; of a pruned
    layer the bit-packed ``weight_mask``. Its metadata holds the structure as JSON and a SHA-256 digest of both. It is
    written beside ``path``, flushed to the disk and renamed, so an interrupted save leaves the old file.

    Args:
        model: any module; its tensors may be on any device, of any dtype that safetensors has.
        path: the file; an existing one is replaced.
        format: ``"sparse-24-bitmask"`` writes the weights as llm-compressor did, for tools that read those: every
            ``Linear24`` packed, all else dense, neither other masks nor a digest. ``"masks"`` writes the masks alone,
            beside a folder of ``save_pretrained`` for one, which keeps the weights with their zeros.

    Raises:
        TypeError: ``model`` is not a module, or its state dict holds something that is not a tensor.
        OSError: the file cannot be written.
        ValueError: a tensor has no data (the meta device), ``format`` is another, or has no place for a layer, a mask
            does not belong to its weight any more, or there are no masks to be written alone.
    """
    check_model(model)
    if format not in get_args(Format):
        raise ValueError(f"format must be one of {get_args(Format)}, got {format!r}")
    if format == "masks":
        layers, masks = masks_of(model)
        tensors, shared = unique(masks)
        write(Path(path), tensors, seal(dump(layers, shared), tensors))
        return
    check_masks(model)
    state = dict(model.state_dict())
    if format == "sparse-24-bitmask":
        tensors, _ = unique(to_bitmask24(model, state))
        write(Path(path), tensors, {"format": "pt"})
        return
    layers = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if layer := Layer.of(module):
            layers[name] = layer
            if layer.mask:
                state[join(name, "weight_mask")] = module.weight_mask
    tensors, shared = unique(state)
    write(Path(path), tensors, seal(dump(layers, shared), tensors))


def load(model: nn.Module, path: str | os.PathLike[str], *, dense: bool = False) -> None:
    """Makes ``model`` what ``save`` wrote: weights, dtypes, shared tensors, masks and compressed layers.

    Everything is verified before the model is touched, and nothing is ever unpickled. Parameters are replaced, so make
    the optimizer afterwards. Each tensor goes to the device of the one that it replaces, to the CPU from ``meta``.
    ``decompress_`` makes the compressed layers dense again, as after ``compress_``.

    A packed 2:4 layer becomes a ``Linear24``, or keeps the plan of the ``RoutedLinear24`` that it replaces; a tiered
    one becomes a ``TieredLinear``. A file does not say what is fastest on another machine: on a GPU load with
    ``dense=True``, and let ``compress_`` measure. A file of masks alone leaves the weights as they are: the model has
    them already, with zeros wherever a mask drops one.

    Args:
        model: the same architecture, freshly made, pruned or compressed; also on the meta device.
        path: a file that ``save`` wrote, in any of its formats; or another file, or folder of files, of a whole model
            in ``sparse-24-bitmask`` or ``sparse-bitmask``.
        dense: whether compressed layers come back as dense ones, to be fine-tuned or exported.

    Raises:
        TypeError: ``model`` is not a module.
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, altered or foreign, or does not fit the model; the message names the file
            and what is wrong, and the model is as it was.
    """
    check_model(model)
    try:
        structure, tensors = _read(Path(path))
        layers, shared = from_bitmask24(model, tensors) if structure is None else parse(structure)
        for name, source in shared.items():
            if name in tensors or source not in tensors:
                raise ValueError(f"{name!r} cannot share the tensor {source!r}")
            tensors[name] = tensors[source]
        if only_masks(layers, tensors):
            with _undone_on_failure(model):
                assign_masks(model, layers, tensors)
            return
        _check_shapes(model, layers)
        for name, layer in layers.items():
            layer.check(name, tensors)
        if dense:
            layers = {name: layer.densify(name, tensors) for name, layer in layers.items()}
        with _undone_on_failure(model):
            _swap(model, layers, tensors)
            _assign(model, layers, tensors)
            guard_saving(model)
    except ValueError as error:
        raise ValueError(f"cannot load {os.fspath(path)}: {error}") from error


def _read(path: Path) -> tuple[str | None, dict[str, Tensor]]:
    """The structure, None in a foreign file, and the tensors of a file or of a folder of foreign ones."""
    return (None, dict(Shards(path))) if path.is_dir() else read(path)


def _check_shapes(model: nn.Module, layers: Mapping[str, Layer]) -> None:
    """Rejects layers that the model has not in their shape: first, or a small file could ask for any memory."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, layer in layers.items():
        module = modules.get(name)
        if module is None or not (
            isinstance(module, Compressed) or isinstance(getattr(module, "weight", None), Tensor)
        ):
            raise ValueError(f"it does not fit the model: there is no layer {name!r} with a weight")
        if layer.shape != weight_shape(module):
            raise ValueError(f"layer {name!r} has shape {layer.shape}, the model's has {weight_shape(module)}")


def _swap(model: nn.Module, layers: Mapping[str, Layer], tensors: Mapping[str, Tensor]) -> None:
    """Puts a module of the kind that the file says in every place."""
    made: dict[nn.Module, nn.Module] = {}
    make: Callable[[], nn.Module]
    for name, module in list(model.named_modules(remove_duplicate=False)):
        layer = layers.get(name)
        if layer is not None and layer.kind != "dense":
            make = partial(_compressed, name, module, layer, tensors)
        elif isinstance(module, Compressed):
            make = partial(_dense, name, module)
        else:
            continue
        if not name:
            raise ValueError("the model is a single layer, which cannot be replaced within it: put it in a Sequential")
        if module not in made:
            made[module] = make()
        model.set_submodule(name, made[module])


def _dense(name: str, module: Compressed) -> nn.Module:
    check_known(name, module)
    return refill(module)


def _compressed(name: str, module: nn.Module, layer: Layer, tensors: Mapping[str, Tensor]) -> Compressed:
    """The compressed layer to put in place of ``module``, which is emptied if it is dense."""
    if not isinstance(module, Compressed) and not (
        isinstance(module, nn.Linear) is not layer.transposed
        and isinstance(module._parameters.get("weight"), Tensor)
        and hasattr(module, "bias")
    ):
        raise ValueError(f"layer {name!r} is {layer.kind!r} in the file and {type(module).__name__} in the model")
    device, trainable = _device(_stored(module)), _trainable(module)
    new: Compressed
    if layer.kind == "linear24":
        rows, cols = layer.matrix
        values, bitmask = (tensors[join(name, part)].to(device) for part in ("values", "bitmask"))
        plan = module.plan if isinstance(module, RoutedLinear24) else None
        kind = Linear24 if plan is None else RoutedLinear24
        new = kind(cols, rows, False, transposed=layer.transposed, device="meta", dtype=values.dtype)
        new.values, new.bitmask = nn.Parameter(values, requires_grad=trainable), bitmask
        if isinstance(new, RoutedLinear24) and plan is not None:
            new.follow(plan)
    elif layer.kind == "tiered":
        rows, cols = layer.matrix
        packed = TieredWeight(*(part.to(device) for part in layer.tiered(name, tensors)))
        new = TieredLinear(
            packed, in_features=cols, out_features=rows, transposed=layer.transposed, requires_grad=trainable
        )
    else:
        weight = tensors[join(name, "weight")].to(device)
        weight = nn.Parameter(weight.t() if layer.transposed else weight, requires_grad=trainable)
        new = PrepackedLinear(weight, None, tokens=layer.tokens, transposed=layer.transposed)
    new.bias = module.bias  # type: ignore[assignment]
    original = get_original(module) if isinstance(module, Compressed) else module
    if original is module:
        module.weight = nn.Parameter(_stored(module).detach().new_empty(0), requires_grad=trainable)
        remove_mask(module)
    if original is not None:
        set_original(new, original)
    return new.train(module.training)


def _assign(model: nn.Module, layers: Mapping[str, Layer], tensors: Mapping[str, Tensor]) -> None:
    """Gives every parameter, buffer and mask its tensor: one object per stored tensor, so that what was shared is
    shared again, and nothing else is.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    state = dict(tensors)
    masks = {name: state.pop(join(name, "weight_mask")) for name, layer in layers.items() if layer.mask}
    current = model.state_dict()
    _check_names(set(current), set(state))
    for key, tensor in current.items():
        if tensor.shape != state[key].shape:
            raise ValueError(f"{key} has shape {tuple(state[key].shape)}, the model's {tuple(tensor.shape)}")
        if tensor.is_floating_point() is not state[key].is_floating_point():
            raise ValueError(f"{key} is {state[key].dtype}, the model's {tensor.dtype}")
    for name, layer in layers.items():
        if layer.kind == "prepacked":
            del state[join(name, "weight")]  # it is there already, reordered
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
    for module in modules.values():
        remove_mask(module)
    for name, bits in masks.items():
        if (info := layers[name].mask) is not None:
            set_mask_bits(modules[name], placed(bits, _device(_stored(modules[name])), False), info)


@contextmanager
def _undone_on_failure(model: nn.Module) -> Iterator[None]:
    """Puts every module's attributes back if the block fails; a record of references, no tensor is copied."""

    def attributes(module: nn.Module) -> dict[str, Any]:
        return {key: copy.copy(v) if isinstance(v, dict | list | set) else v for key, v in vars(module).items()}

    record = [(module, attributes(module)) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, before in record:
            vars(module).clear()
            vars(module).update(before)
            if (original := get_original(module)) is not None:
                empty(original)
        raise


def _check_names(model: set[str], file: set[str]) -> None:
    wrong = [
        f"{what} {', '.join(sorted(names)[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
        for what, names in (("missing", model - file), ("unexpected", file - model))
        if names
    ]
    if wrong:
        raise ValueError(f"it does not fit the model: {'; '.join(wrong)}")


def _stored(module: nn.Module) -> Tensor:
    """The tensor that the layer holds its weight in."""
    if isinstance(module, PrepackedLinear):
        return module.packed
    if isinstance(module, TieredLinear):
        return module.dense
    return module.values if isinstance(module, Linear24) else module.weight  # type: ignore[return-value]


def _trainable(module: nn.Module) -> bool:
    return module.trainable if isinstance(module, Compressed) else _stored(module).requires_grad


def _device(tensor: Tensor) -> torch.device:
    """Where a tensor that replaces this one goes."""
    return torch.device("cpu") if tensor.is_meta else tensor.device
