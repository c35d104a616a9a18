"""Reads the weights and masks in safetensors files, one after the other; nothing is unpickled."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .._safetensors import read_tensors
from ..checkpoint.bitmask import find_packed, unpack_bitmask
from ..checkpoint.mask_file import holds_only_masks
from ..checkpoint.pretrained import read_folder
from ..checkpoint.shards import Shards
from ..checkpoint.structure import join, parse_structure
from ..checkpoint.verify import verify, verify_mask
from ..masks import Axis, MaskInfo, Pattern
from ..ops import unpack_bits

Masks = Mapping[str, tuple[Tensor, MaskInfo]]
INFO24 = MaskInfo(Pattern.parse("2:4"), 1)


@dataclass(frozen=True)
class Role:
    """The role of a layer in its model.

    Args:
        axis: the dimension of the weight that the inputs run along.
        exempt: why an expected pattern does not apply to the layer; empty if it does.
        experts: whether the weight holds the matrices of experts, ``[experts, ...]``.
    """

    axis: Axis
    exempt: str = ""
    experts: bool = False


def exempt_roles(roles: Mapping[str, Role | None], names: Iterable[str], left: Mapping[str, str]) -> dict[str, Role]:
    """Returns the roles of those ``names`` that are in ``left``, exempt for the reasons that ``left`` gives."""
    found = {}
    for name in names:
        role = roles.get(name, Role(1))
        if name in left and role is not None:
            found[name] = replace(role, exempt=role.exempt or left[name])
    return found


@dataclass(frozen=True)
class Matrix:
    """The weight of one layer in the layer's own shape; ``stored`` is its bytes in the file, without the mask."""

    name: str
    weight: Tensor
    role: Role
    stored: int
    mask: Tensor | None = None
    info: MaskInfo | None = None


def is_ours(path: Path) -> bool:
    """Returns whether ``sparsekit.save`` wrote the file.

    Raises:
        ValueError: it is not a safetensors file.
    """
    try:
        with safe_open(path, "pt") as file:
            return "sparsekit" in (file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated, or no safetensors file ({error})") from error


def read_masks(path: Path) -> dict[str, tuple[Tensor, MaskInfo]]:
    """Reads the masks in a file that ``sparsekit.save`` wrote, by layer.

    Raises:
        ValueError: something else wrote the file, or it was altered.
    """
    try:
        structure, tensors = read_tensors(path)
        if structure is None:
            raise ValueError("it was not written by sparsekit.save")
        layers, shared = parse_structure(structure)
        tensors |= {name: tensors[source] for name, source in shared.items() if source in tensors}
        return {
            name: (verify_mask(name, layer, tensors).view(layer.shape), layer.mask)
            for name, layer in layers.items()
            if layer.mask is not None
        }
    except ValueError as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def own_matrices(path: Path, roles: Mapping[str, Role | None]) -> Iterator[Matrix]:
    """Yields the layers in a file that ``sparsekit.save`` wrote: the compressed and pruned ones, then the plain ones.

    Args:
        path: the file, or a folder that ``from_pretrained`` loads with sparsekit.
        roles: the roles of the model's modules; a plain weight is yielded only if its module has one.

    Raises:
        ValueError: the file was altered, or its layers are not what it says.
    """
    try:
        if (found := read_folder(path)) is not None:
            layers, shared, tensors = found
        else:
            structure, tensors = read_tensors(path)
            layers, shared = parse_structure(structure or "")
        tensors |= {name: tensors[source] for name, source in shared.items() if source in tensors}
        if holds_only_masks(layers, tensors):
            raise ValueError("it holds masks alone, their weights are in the other files of its folder")
        for name, layer in layers.items():
            verify(name, layer, tensors)
            bits = tensors.pop(layer.mask_name(name), None)
            held = {key for key in tensors if key.rpartition(".")[0] == name} - {join(name, "bias")}
            if layer.kind == "dense":
                held = {layer.weight_name(name)}
            stored = sum(tensors[key].nbytes for key in held)
            layer.densify(name, tensors)
            axis: Axis = layer.mask.axis if layer.mask else 0 if layer.transposed else 1
            role = roles.get(name)
            role = Role(axis, role.exempt if role else "", experts=len(layer.shape) == 3)
            mask = None if bits is None else _mask(bits, layer.shape)
            yield Matrix(name, tensors.pop(layer.weight_name(name)), role, stored, mask, layer.mask)
        for key, weight in tensors.items():
            name, _, part = key.rpartition(".")
            role = roles.get(name)
            if part == "weight" and role is not None and weight.dim() >= 2 and key not in shared:
                yield Matrix(name, weight, role, weight.nbytes)
    except ValueError as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def matrices(tensors: Shards, roles: Mapping[str, Role | None], masks: Masks) -> Iterator[Matrix]:
    """Yields the layers in ordinary safetensors files, and in those that llm-compressor packed.

    Args:
        tensors: the tensors of one model.
        roles: the roles of the model's modules, None for a module that is not a layer. A tensor of at least two
            dimensions whose name ends in ``weight`` is taken for a layer too if no module has its name, so that none is
            overlooked.
        masks: stored masks, by layer.

    Raises:
        ValueError: a file is damaged, or a packed weight malformed.
    """
    packed = find_packed(tensors)
    for key in (*tensors, *packed):
        name, _, part = key.rpartition(".")
        if (experts := roles.get(key)) is not None and experts.experts:
            yield Matrix(key, tensors[key], experts, tensors[key].nbytes, *masks.get(key, (None, None)))
            continue
        role = roles.get(name, Role(1))
        mask, info = masks.get(name, (None, None))
        if info is not None and mask is not None and mask.dim() == 3:  # experts, which a calibration pass has found
            role = Role(info.axis, experts=True)
        if part != "weight" or role is None:
            continue
        if key in packed:
            parts = {part: tensors[found] for part, found in packed[key].items()}
            weight = unpack_bitmask(key, parts)
            stored = sum(each.nbytes for each in parts.values())
            if parts["compressed"].dim() == 2:
                mask = unpack_bits(parts["bitmask"].reshape(len(weight), -1), weight.shape[1])
                yield Matrix(name, weight, role, stored, mask, INFO24)
            else:
                yield Matrix(name, weight, role, stored)
        elif len(tensors.shape(key)) >= 2:
            weight = tensors[key]
            yield Matrix(name, weight, role, weight.nbytes, *masks.get(name, (None, None)))


def not_understood(tensors: Shards, roles: Mapping[str, Role | None]) -> list[str]:
    """Returns the names of the matrices that are neither the weight of a layer nor a parameter of another module."""
    parts = {key for each in find_packed(tensors).values() for key in each.values()}

    def strange(key: str) -> bool:
        name, _, part = key.rpartition(".")
        return part != "weight" and key not in roles and bool(not roles or name not in roles or roles[name])

    return [key for key in tensors if key not in parts and strange(key) and len(tensors.shape(key)) >= 2]


def model_matrices(model: nn.Module, roles: Mapping[str, Role | None], masks: Masks) -> Iterator[Matrix]:
    """Yields the layers of a model in memory.

    Args:
        model: has a weight of its own in every module that has a role.
        roles: the roles of its modules, None for a module that is not a layer.
        masks: stored masks, by layer.
    """
    for name, module in model.named_modules():
        for key in module._parameters:
            if (role := roles.get(join(name, key))) is not None and role.experts:
                weight = module.get_parameter(key).detach()
                yield Matrix(join(name, key), weight, role, weight.nbytes, *masks.get(join(name, key), (None, None)))
        if role := roles.get(name):
            weight = module.get_parameter("weight").detach()
            yield Matrix(name, weight, role, weight.nbytes, *masks.get(name, (None, None)))


def _mask(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    return unpack_bits(bits, math.prod(shape[1:])).view(shape)
