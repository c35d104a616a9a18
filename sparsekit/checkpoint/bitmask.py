"""Reads and writes weights that are packed by bitmask in the formats of llm-compressor.

``sparse-24-bitmask`` stores every 2:4 weight as three tensors: ``NAME.compressed`` ``[rows, cols / 2]`` and
``NAME.bitmask`` uint8 ``[rows, ceil(cols / 8)]``, packed as by ``pack24``, and ``NAME.shape``, an int64 column.
``sparse-bitmask`` stores weights with any zeros: ``compressed`` has one dimension, and ``row_offsets`` says where rows
begin. NAME is the name of the layer, or in older files that of the weight, which ends in ``.weight``
(https://github.com/vllm-project/compressed-tensors).
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..nn import Linear24
from ..ops import pack24, pack_bits, unpack_bits
from ..ops._define import DTYPES
from .structure import PARTS as PARTS_OF
from .structure import LayerRecord, join

PARTS = ("compressed", "bitmask", "shape")
OPTIONAL = ("row_offsets",)
QUANTIZED = ("weight_scale", "weight_zero_point", "input_scale", "input_zero_point", "output_scale")
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def find_packed(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Finds the packed weights among tensors.

    Args:
        names: the names of all tensors.

    Returns:
        For each dense weight, such as ``"layers.0.up.weight"``, the tensor names of parts such as ``"compressed"``.

    Raises:
        ValueError: a part is missing, or two weights have the same name.
    """
    names = set(names)
    found: dict[str, dict[str, str]] = {}
    for key in sorted(names):
        base, _, part = key.rpartition(".")
        if part != "compressed":
            continue
        dense = base if base.rpartition(".")[2] in ("weight", "bias") else f"{base}.weight".lstrip(".")
        parts = {part: f"{base}.{part}".lstrip(".") for part in (*PARTS, *OPTIONAL)}
        if missing := [parts[part] for part in PARTS if parts[part] not in names]:
            raise ValueError(f"the tensor {missing[0]!r} is missing")
        if dense in found or dense in names:
            raise ValueError(f"the weight {dense!r} is there twice")
        found[dense] = {part: name for part, name in parts.items() if name in names}
    return found


def unpack_bitmask(name: str, parts: Mapping[str, Tensor]) -> Tensor:
    """Unpacks one weight, of any dtype.

    Args:
        name: the name of the weight, for the messages.
        parts: its tensors ``"compressed"``, ``"bitmask"`` and ``"shape"``.

    Raises:
        ValueError: the parts do not belong together; or half of each row is kept, as in 2:4, but not exactly two of
            every group of four.
    """
    values, shape = parts["compressed"], check_bitmask(name, parts)
    mask = unpack_bits(parts["bitmask"].reshape(*shape[:-1], -(-shape[-1] // 8)), shape[-1])
    if values.dtype in DTYPES:
        return values.new_zeros(shape).masked_scatter(mask, values)
    bits = BITS[values.element_size()]  # float8 tensors can be copied, but masked_scatter does not take them
    dense = torch.zeros(shape, dtype=bits, device=values.device).masked_scatter(mask, values.contiguous().view(bits))
    return dense.view(values.dtype)


def shape_of(name: str, parts: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Returns the shape that is stored with a weight; the arguments and errors are those of ``unpack_bitmask``."""
    sizes = parts["shape"].flatten()
    shape = tuple(sizes[:8].tolist())
    if not 0 < len(sizes) <= 8 or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"{_layer(name)} has the shape {list(shape)}, which must be of integers")
    return shape


def check_bitmask(name: str, parts: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Checks that the parts of a weight belong together, and returns its shape; arguments as in ``unpack_bitmask``."""
    values, bits, shape = parts["compressed"], parts["bitmask"], shape_of(name, parts)
    if bits.dtype != torch.uint8 or bits.numel() != math.prod(shape[:-1]) * -(-shape[-1] // 8):
        raise ValueError(
            f"{_layer(name)} is {list(shape)}, and its bitmask {_dtype(bits)} {list(bits.shape)}: that must be uint8, "
            "a bit for each weight and every row begun with a new byte"
        )
    bits = bits.reshape(*shape[:-1], -(-shape[-1] // 8))
    mask = unpack_bits(bits, shape[-1])
    if not torch.equal(pack_bits(mask), bits):
        raise ValueError(f"{_layer(name)} has bits set past its last column")
    if values.dim() == 2:
        full = len(shape) == 2 and shape[1] % 4 == 0 and list(values.shape) == [shape[0], shape[1] // 2]
        if not full or not bool((mask.unflatten(1, (shape[1] // 4, 4)).sum(-1) == 2).all()):
            raise ValueError(
                f"{_layer(name)} does not keep exactly two of every four columns, as sparse-24-bitmask does"
            )
    elif values.dim() != 1 or values.numel() != int(mask.sum()):
        raise ValueError(f"{_layer(name)} has {int(mask.sum())} bits set, and values of shape {list(values.shape)}")
    return shape


def _layer(name: str) -> str:
    return f"layer {name.removesuffix('weight').removesuffix('.')!r}"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def unpack_all(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yields all tensors; packed weights come dense, and quantized ones in the dtype of their scale.

    Args:
        tensors: a dict, or ``Shards``, whose tensors are read one after the other.

    Raises:
        ValueError: a weight is malformed, or quantized in another way than by float8 or int8 with a scale.
    """
    packed = find_packed(tensors)
    used = {name for parts in packed.values() for name in parts.values()}
    plain = [name for name in tensors if name not in used]
    weights = [name for name in (*plain, *packed) if name.rpartition(".")[2] == "weight"]
    scales = {name: [part for part in QUANTIZED if name.removesuffix("weight") + part in tensors] for name in weights}
    used |= {name.removesuffix("weight") + part for name, parts in scales.items() for part in parts}
    for name in (*plain, *packed):
        if name in used:
            continue
        parts = packed.get(name, {})
        found = {part: tensors[key] for part, key in parts.items()}
        weight = unpack_bitmask(name, found) if found else tensors[name]
        given = {part: tensors[name.removesuffix("weight") + part] for part in scales.get(name, ())}
        yield name, _dequantized(name, weight, given) if given else weight


def _dequantized(name: str, weight: Tensor, given: Mapping[str, Tensor]) -> Tensor:
    scale, zero = given.get("weight_scale"), given.get("weight_zero_point")
    rows = weight.shape[:1]
    if (
        weight.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
        or scale is None
        or scale.dtype not in DTYPES
        or (scale.numel() != 1 and tuple(scale.shape) not in (rows, (*rows, 1)))
        or (zero is not None and bool((zero.float() != 0).any()))
    ):
        raise ValueError(
            f"{_layer(name)} is quantized ({_dtype(weight)} with {', '.join(sorted(given))}), and read are "
            "only float8 and int8 with one weight_scale, or one for each row, and zero at 0"
        )
    sizes = () if scale.numel() == 1 else (*rows, *(1 for _ in weight.shape[1:]))
    return (weight.float() * scale.float().reshape(sizes)).to(scale.dtype)


def pack_all(
    tensors: Mapping[str, Tensor], where: Callable[[str], bool] = lambda name: True
) -> Iterator[tuple[str, Tensor]]:
    """Yields all tensors; 2:4 weights come packed as ``sparse-24-bitmask``.

    Args:
        tensors: a dict, or ``Shards``, whose tensors are read one after the other.
        where: whether a layer may be packed, given its name, such as ``"layers.0.up"``.

    A tensor is packed if it is a float32, float16 or bfloat16 matrix, its name ends in ``weight``, its columns are a
    multiple of 4, and at most two of every four are non-zero.
    """
    for name in tensors:
        tensor = tensors[name]
        layer, _, part = name.rpartition(".")
        if part != "weight" or not where(layer) or not is_24(tensor):
            yield name, tensor
            continue
        for part, packed in zip(PARTS, pack_bitmask24(tensor), strict=True):
            yield f"{layer}.{part}".lstrip("."), packed


def is_24(weight: Tensor) -> bool:
    """Returns whether ``sparse-24-bitmask`` can pack a weight."""
    if weight.dim() != 2 or weight.dtype not in DTYPES or weight.shape[1] % 4 or not weight.numel():
        return False
    return bool(((weight != 0).unflatten(1, (weight.shape[1] // 4, 4)).sum(-1) <= 2).all())


def pack_bitmask24(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the ``PARTS`` of a 2:4 weight: values, bitmask, and the shape as an int64 column."""
    values, bitmask, shape = pack24(weight)
    return values, bitmask, shape_column(*shape)


def shape_column(rows: int, cols: int) -> Tensor:
    """Returns a shape as these files store it."""
    return torch.tensor([[rows], [cols]], device="cpu")


def to_bitmask24(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames the packed tensors of a state dict as ``sparse-24-bitmask`` does, and unpacks tiered and lossy ones.

    Raises:
        ValueError: the format cannot hold one of the packed layers, or the model has no ``Linear24``.
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
        elif (record := LayerRecord.of(layer)) is not None and record.kind in PARTS_OF:
            for part in PARTS_OF[record.kind]:
                del state[join(name, part)]
            if layer not in unpacked:
                unpacked[layer] = layer.weight.detach().clone()
            state[join(name, "weight")] = unpacked[layer]
    return state


def from_bitmask24(model: nn.Module, tensors: dict[str, Tensor]) -> tuple[dict[str, LayerRecord], dict[str, str]]:
    """Renames the tensors back, in place, and unpacks weights of ``sparse-bitmask``.

    Returns the compressed layers, and for each name of a shared tensor that is missing in the file the name that is
    there. These files have a shared tensor under only one name, so the model says what is shared.

    Raises:
        ValueError: no tensor is packed in this format, or the parts of one do not belong together.
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
        layers[name] = LayerRecord.parse(name, {**entry, "mask": {"pattern": "2:4", "axis": 1}})
        tensors[join(name, "values")] = parts["compressed"]
        tensors[join(name, "bitmask")] = tensors[join(name, "weight_mask")] = parts["bitmask"]
    return layers, shared_names(model, tensors)


def shared_names(model: nn.Module, stored: Collection[str]) -> dict[str, str]:
    """Returns, for each name of a model's tensor that is not stored, the stored name of the same tensor, if any is."""
    state = model.state_dict(keep_vars=True)
    known = {id(state[name]): name for name in stored if name in state}
    return {name: known[id(state[name])] for name in state if name not in stored and id(state[name]) in known}
