"""Checkpoints: one safetensors file with weights, packed weights and masks, and in its metadata their structure."""

import copy
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._archive import read, unique, write
from .masks import Axis, MaskInfo, Pattern, get_mask_info, remove_mask
from .nn import Linear24, PrepackedLinear
from .ops import pack_bits, unpack24, unpack_bits
from .ops._define import DTYPES
from .ops.sparse24 import values_per_row

VERSION = 1
_MAX_TOKENS = 1 << 20


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a model, with its masks and its compressed layers, to one safetensors file.

    The file holds the state dict, each shared tensor once; of a compressed layer the packed ``values`` and ``bitmask``;
    of a pruned layer the bit-packed ``weight_mask``. Its metadata holds the structure as JSON and a SHA-256 digest of
    both. It is written beside ``path``, flushed to the disk and renamed, so an interrupted save leaves the old file.

    Args:
        model: any module; its tensors may be on any device, of any dtype that safetensors has.
        path: the file; an existing one is replaced.

    Raises:
        TypeError: ``model`` is not a module, or its state dict holds something that is not a tensor.
        ValueError: a tensor has no data (the meta device).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    state = dict(model.state_dict())
    layers = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if layer := _Layer.of(module):
            layers[name] = layer.to_json()
            if layer.mask:
                state[_join(name, "weight_mask")] = module.weight_mask
    tensors, shared = unique(state)
    structure = json.dumps({"version": VERSION, "layers": layers, "shared": shared})
    write(Path(path), structure, tensors)


def load(model: nn.Module, path: str | os.PathLike[str], *, dense: bool = False) -> None:
    """Makes ``model`` what ``save`` wrote: weights, dtypes, shared tensors, masks and compressed layers.

    Everything is verified before the model is touched, and nothing is ever unpickled. Parameters are replaced, so make
    the optimizer afterwards. Each tensor goes to the device of the one that it replaces, to the CPU from ``meta``.

    Args:
        model: the same architecture, freshly made, pruned or compressed; also on the meta device.
        path: a file that ``save`` wrote.
        dense: whether compressed layers come back as dense ones, to be fine-tuned or exported.

    Raises:
        TypeError: ``model`` is not a module.
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, altered or foreign, or does not fit the model; the message names the file
            and what is wrong, and the model is as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    try:
        structure, tensors = read(Path(path))
        layers, shared = _parse(structure)
        for name, source in shared.items():
            if name in tensors or source not in tensors:
                raise ValueError(f"{name!r} cannot share the tensor {source!r}")
            tensors[name] = tensors[source]
        for name, layer in layers.items():
            layer.check(name, tensors)
        if dense:
            layers = {name: layer.densify(name, tensors) for name, layer in layers.items()}
        with _undone_on_failure(model):
            _apply(model, layers, tensors)
    except ValueError as error:
        raise ValueError(f"cannot load {os.fspath(path)}: {error}") from error


@dataclass(frozen=True)
class _Layer:
    """What the structure says of a layer that is compressed or pruned."""

    kind: str
    shape: tuple[int, ...]
    transposed: bool = False
    tokens: int = 1
    mask: MaskInfo | None = None

    @staticmethod
    def of(module: nn.Module) -> "_Layer | None":
        mask = get_mask_info(module)
        if isinstance(module, Linear24):
            return _Layer("linear24", _weight_shape(module), module.transposed, mask=mask)
        if isinstance(module, PrepackedLinear):
            return _Layer("prepacked", _weight_shape(module), module.transposed, module.tokens, mask)
        return _Layer("dense", _weight_shape(module), mask=mask) if mask else None

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of a compressed layer's weight, as ``[outputs, inputs]``."""
        rows, cols = self.shape
        return (cols, rows) if self.transposed else (rows, cols)

    def to_json(self) -> dict[str, Any]:
        mask = self.mask and {"pattern": str(self.mask.pattern), "axis": self.mask.axis}
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "transposed": self.transposed,
            "tokens": self.tokens,
            "mask": mask,
        }

    @staticmethod
    def parse(name: str, data: Any) -> "_Layer":
        where = f"layer {name!r}"
        kind = _field(where, data, "kind", str)
        if kind not in ("linear24", "prepacked", "dense"):
            raise ValueError(f"{where} is {kind!r}, known are 'linear24', 'prepacked' and 'dense'")
        shape = tuple(_field(where, data, "shape", list))
        if (
            not all(type(size) is int and size >= 0 for size in shape)
            or len(shape) < 2
            or (kind != "dense" and len(shape) != 2)
        ):
            raise ValueError(f"{where} has the shape {list(shape)}")
        tokens = _field(where, data, "tokens", int)
        if not 0 < tokens <= _MAX_TOKENS:
            raise ValueError(f"{where} has {tokens} tokens, 1 to {_MAX_TOKENS} are allowed")
        mask = data.get("mask")
        info = None if mask is None else _parse_mask(f"the mask of {where}", mask, len(shape))
        return _Layer(kind, shape, _field(where, data, "transposed", bool), tokens, info)

    def check(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Verifies that the layer's own tensors are there, have its shape, and are well-formed bits."""
        if self.kind == "linear24":
            rows, cols = self.matrix
            values = _tensor(tensors, _join(name, "values"), (rows, values_per_row(cols)))
            if values.dtype not in DTYPES:
                raise ValueError(f"{_join(name, 'values')} is {values.dtype}, not float32, float16 or bfloat16")
            kept = _bits(tensors, _join(name, "bitmask"), (rows, cols))
            full = cols // 4 * 4
            if not (kept[:, full:].all() and (kept[:, :full].unflatten(1, (full // 4, 4)).sum(-1) == 2).all()):
                raise ValueError(f"{_join(name, 'bitmask')} does not keep exactly two of every four columns")
        else:
            _tensor(tensors, _join(name, "weight"), self.shape)
        if self.mask:
            _bits(tensors, _join(name, "weight_mask"), (self.shape[0], math.prod(self.shape[1:])))

    def densify(self, name: str, tensors: dict[str, Tensor]) -> "_Layer":
        """The same layer as a dense one; its packed tensors are replaced by the weight."""
        if self.kind == "linear24":
            values, bitmask = tensors.pop(_join(name, "values")), tensors.pop(_join(name, "bitmask"))
            weight = unpack24(values, bitmask, self.matrix[1])
            tensors[_join(name, "weight")] = weight.t().contiguous() if self.transposed else weight
        return _Layer("dense", self.shape, mask=self.mask)


def _apply(model: nn.Module, layers: Mapping[str, _Layer], tensors: Mapping[str, Tensor]) -> None:
    state = dict(tensors)
    masks = {name: state.pop(_join(name, "weight_mask")) for name, layer in layers.items() if layer.mask}
    made: dict[int, nn.Module] = {}
    prepacked = set()
    for name, module in list(model.named_modules(remove_duplicate=False)):
        layer = layers.get(name)
        if isinstance(module, Linear24 | PrepackedLinear) or (layer and layer.kind != "dense"):
            if id(module) not in made:
                made[id(module)] = _make(name, module, layer, tensors)
            model.set_submodule(name, made[id(module)])
        if layer and layer.kind == "prepacked":
            prepacked.add(_join(name, "weight"))

    modules = dict(model.named_modules(remove_duplicate=False))
    current = model.state_dict()
    _check_names(set(current), set(state), set(layers) - set(modules))
    for key, tensor in current.items():
        if tensor.shape != state[key].shape:
            raise ValueError(f"{key} has shape {tuple(state[key].shape)}, the model's {tuple(tensor.shape)}")

    # One object per stored tensor, so that what was shared is shared again, and nothing else is.
    parameters = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    objects: dict[tuple[int, bool, torch.device], Tensor] = {}

    def placed(tensor: Tensor, device: torch.device, parameter: bool) -> Tensor:
        device = torch.device("cpu") if device.type == "meta" else device
        key = (id(tensor), parameter, device)
        if key not in objects:
            moved = tensor.to(device)
            objects[key] = nn.Parameter(moved, requires_grad=False) if parameter else moved
        return objects[key]

    own = {
        key: placed(tensor, current[key].device, key in parameters)
        for key, tensor in state.items()
        if key not in prepacked
    }
    model.load_state_dict(own, strict=False, assign=True)
    for module in modules.values():
        remove_mask(module)
    for name, bits in masks.items():
        modules[name].register_buffer(
            "weight_mask", placed(bits, _stored(modules[name]).device, False), persistent=False
        )
        modules[name].weight_mask_info = layers[name].mask


def _make(name: str, module: nn.Module, layer: _Layer | None, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The layer to put in place of ``module``: packed or prepacked as saved, or plain where it was saved dense."""
    if not name:
        raise ValueError("the model is a single layer, which cannot be replaced from within: put it in a Sequential")
    if layer is None or layer.kind == "dense":
        if module.transposed:
            raise ValueError(f"layer {name!r} is dense in the file and compressed in the model: decompress_ it first")
        return module.to_linear()  # type: ignore[operator]
    compressed = isinstance(module, Linear24 | PrepackedLinear)
    linear = isinstance(module, nn.Linear) if not layer.transposed else not isinstance(module, nn.Linear)
    if not compressed and not (
        linear and hasattr(module, "bias") and isinstance(getattr(module, "weight", None), Tensor)
    ):
        raise ValueError(f"layer {name!r} is {layer.kind!r} in the file and {type(module).__name__} in the model")
    if layer.shape != _weight_shape(module):
        raise ValueError(f"layer {name!r} has shape {layer.shape}, the model's has {_weight_shape(module)}")
    device = _stored(module).device if _stored(module).device.type != "meta" else torch.device("cpu")
    new: Linear24 | PrepackedLinear
    if layer.kind == "linear24":
        rows, cols = layer.matrix
        values, bitmask = (tensors[_join(name, part)].to(device) for part in ("values", "bitmask"))
        new = Linear24(cols, rows, False, transposed=layer.transposed, device="meta", dtype=values.dtype)
        new.values = nn.Parameter(values, requires_grad=_trainable(module))
        new.bitmask, new.bias = bitmask, module.bias  # type: ignore[assignment]
    else:
        weight = tensors[_join(name, "weight")].to(device)
        weight = nn.Parameter(weight.t() if layer.transposed else weight, requires_grad=_trainable(module))
        new = PrepackedLinear(weight, None, tokens=layer.tokens, transposed=layer.transposed)
        new.bias = module.bias  # type: ignore[assignment]
    return new.train(module.training)


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
        raise


def _parse(structure: str) -> tuple[dict[str, _Layer], dict[str, str]]:
    try:
        root = json.loads(structure)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its structure is not JSON ({error})") from error
    version = _field("the structure", root, "version", int)
    if version != VERSION:
        raise ValueError(f"it has version {version} of the format, this sparsekit reads version {VERSION}")
    shared = _field("the structure", root, "shared", dict)
    if not all(isinstance(name, str) for name in shared.values()):
        raise ValueError("'shared' must map names to names")
    layers = _field("the structure", root, "layers", dict)
    return {name: _Layer.parse(name, data) for name, data in layers.items()}, shared


def _parse_mask(where: str, data: Any, dims: int) -> MaskInfo:
    axis: Axis | None = data.get("axis") if isinstance(data, dict) else None
    if axis != "flatten" and not (type(axis) is int and -dims <= axis < dims):
        raise ValueError(f"{where} has the axis {axis!r}, for a weight of {dims} dimensions")
    return MaskInfo(Pattern.parse(_field(where, data, "pattern", str)), axis)


def _field(where: str, data: Any, key: str, kind: type) -> Any:
    if not isinstance(data, dict) or type(data.get(key)) is not kind:
        raise ValueError(f"{where} has no {key!r} of type {kind.__name__}")
    return data[key]


def _tensor(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    if name not in tensors:
        raise ValueError(f"the tensor {name!r} is missing")
    if tensors[name].shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, its layer needs {tuple(shape)}")
    return tensors[name]


def _bits(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, int]) -> Tensor:
    """The bool mask ``shape`` of a bit-packed tensor, verified."""
    bits = _tensor(tensors, name, (shape[0], -(-shape[1] // 8)))
    if bits.dtype != torch.uint8:
        raise ValueError(f"{name} is {bits.dtype}, not uint8")
    mask = unpack_bits(bits, shape[-1])
    if not torch.equal(pack_bits(mask), bits):
        raise ValueError(f"{name} has bits set past its last column")
    return mask


def _check_names(model: set[str], file: set[str], unknown: set[str]) -> None:
    wrong = [
        f"{what} {', '.join(sorted(names)[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
        for what, names in (("missing", model - file), ("unexpected", file - model), ("unknown layers", unknown))
        if names
    ]
    if wrong:
        raise ValueError(f"it does not fit the model: {'; '.join(wrong)}")


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    if isinstance(module, Linear24 | PrepackedLinear):
        shape = (module.out_features, module.in_features)
        return shape[::-1] if module.transposed else shape
    return tuple(module.weight.shape)  # type: ignore[arg-type]


def _stored(module: nn.Module) -> Tensor:
    """The tensor that the layer holds its weight in."""
    if isinstance(module, PrepackedLinear):
        return module.packed
    return module.values if isinstance(module, Linear24) else module.weight  # type: ignore[return-value]


def _trainable(module: nn.Module) -> bool:
    return module.trainable if isinstance(module, PrepackedLinear) else _stored(module).requires_grad


def _join(layer: str, part: str) -> str:
    return f"{layer}.{part}" if layer else part
