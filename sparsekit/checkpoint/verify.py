"""Verifies that the tensors of a file fit the structure that it describes."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..nn.quantized24 import check_codes
from ..ops import TieredWeight, pack_bits, unpack_bits
from ..ops._define import DTYPES
from ..ops.nf4 import check_nf4
from ..ops.quant24 import check_quantized24
from ..ops.sparse24 import values_per_row
from .structure import PARTS, LayerRecord, join


def verify(name: str, record: LayerRecord, tensors: Mapping[str, Tensor]) -> None:
    """Verifies that all tensors of a layer are there, have the right shape and dtype, and hold a valid pattern."""
    if record.kind == "linear24":
        rows, cols = record.matrix
        values = _tensor(tensors, join(name, "values"), (rows, values_per_row(cols)))
        _check_float(join(name, "values"), values)
        _check_bitmask24(name, record, tensors)
    elif record.kind == "conv24":
        outputs, inputs, *kernel = record.shape
        values = _tensor(tensors, join(name, "values"), (outputs, math.prod(kernel), values_per_row(inputs)))
        _check_float(join(name, "values"), values)
        bitmask = _tensor(tensors, join(name, "bitmask"), (outputs, math.prod(kernel), -(-inputs // 8)))
        _check_kept24(join(name, "bitmask"), _bits_of(join(name, "bitmask"), bitmask.flatten(0, 1), inputs))
    elif record.kind == "quantized24":
        for part in PARTS[record.kind]:
            _present(tensors, join(name, part))
        packed = record.quantized(name, tensors)
        try:
            check_quantized24(packed)
            check_codes(packed.values, packed.quant_type)
        except (TypeError, ValueError) as error:
            raise ValueError(f"layer {name!r} is not quantized as quantize24 does: {error}") from error
        _check_bitmask24(name, record, tensors)
    elif record.kind == "nf4":
        for part in PARTS[record.kind]:
            _present(tensors, join(name, part))
        packed4 = record.nf4(name, tensors)
        try:
            check_nf4(packed4)
        except (TypeError, ValueError) as error:
            raise ValueError(f"layer {name!r} is not quantized as quantize_nf4 does: {error}") from error
        if not bool((packed4.absmax.isfinite() & (packed4.absmax >= 0)).all()):
            raise ValueError(f"layer {name!r} has an absmax that is negative, infinite or NaN")
    elif record.kind == "int8":
        rows, cols = record.matrix
        values = _tensor(tensors, join(name, "values"), (rows, cols))
        scales = _tensor(tensors, join(name, "scales"), (rows,))
        if values.dtype != torch.int8 or scales.dtype != torch.float32 or bool((values == -128).any()):
            raise ValueError(f"layer {name!r} does not have int8 values from -127 to 127 and float32 scales")
    elif record.kind == "tiered":
        for part in PARTS[record.kind]:
            _present(tensors, join(name, part))
        _tensor(tensors, join(name, "tiers"), record.grid)
        try:
            _check_tiered(record.tiered(name, tensors), record.block, record.k)
        except (TypeError, ValueError) as error:
            raise ValueError(f"layer {name!r} is not packed as pack_tiered does: {error}") from error
    else:
        weight = _tensor(tensors, record.weight_name(name), record.shape)
        if not weight.is_floating_point():
            raise ValueError(f"{record.weight_name(name)} is {weight.dtype}, not floating point")
    if record.mask:
        verify_mask(name, record, tensors)


def verify_mask(name: str, record: LayerRecord, tensors: Mapping[str, Tensor]) -> Tensor:
    """Returns the bool mask ``[rows, columns]`` of a layer, after a check that it is there and valid."""
    return _bits(tensors, record.mask_name(name), (record.shape[0], math.prod(record.shape[1:])))


def _check_bitmask24(name: str, record: LayerRecord, tensors: Mapping[str, Tensor]) -> None:
    rows, cols = record.matrix
    _check_kept24(join(name, "bitmask"), _bits(tensors, join(name, "bitmask"), (rows, cols)))


def _check_kept24(name: str, kept: Tensor) -> None:
    full = kept.shape[1] // 4 * 4
    if not (kept[:, full:].all() and (kept[:, :full].unflatten(1, (full // 4, 4)).sum(-1) == 2).all()):
        raise ValueError(f"{name} does not keep exactly two of every four columns")


def _check_float(name: str, values: Tensor) -> None:
    if values.dtype not in DTYPES:
        raise ValueError(f"{name} is {values.dtype}, not float32, float16 or bfloat16")


def _check_tiered(packed: TieredWeight, block: tuple[int, int], k: int) -> None:
    """Verifies that a kernel would not read or write outside of the weight.

    The shapes and dtypes of the parts have been checked before.

    Raises:
        ValueError: the packed weight is not one that ``pack_tiered`` returns.
    """
    found = packed.topk.shape[1]
    if packed.block != block or found != k or k > block[0] * block[1]:
        raise ValueError(f"blocks of {packed.block} and k={found} in a layer of {block} and k={k}")
    groups = unpack_bits(packed.bitmask.flatten(0, 1), block[1]).unflatten(1, (block[1] // 4, 4))
    if not (groups.sum(-1) == 2).all():
        raise ValueError("bitmask does not keep exactly two of every four columns")
    if not _ascending(packed.positions, packed.topk):
        raise ValueError("positions do not ascend to a padding of zeros")
    if not _within(packed):
        raise ValueError("entries lie outside of the weight")


def _ascending(positions: Tensor, topk: Tensor) -> bool:
    """Returns whether every row of positions ascends, and ends in a padding of zeros whose values are zero."""
    first, later = positions[:, :-1], positions[:, 1:]
    padding = later == 0
    rises = padding | (later > first)
    ends = ~padding[:, :-1] | padding[:, 1:]
    return bool(rises.all()) and bool(ends.all()) and not bool((topk[:, 1:][padding] != 0).any())


def _within(packed: TieredWeight) -> bool:
    """Returns whether nothing is kept in the padding of the last blocks."""
    rows, cols = packed.shape
    whole = packed.block[0] * packed.tiers.shape[0], packed.block[1] * packed.tiers.shape[1]
    if whole == packed.shape:
        return True
    padded = packed._replace(topk=torch.ones_like(packed.topk), shape=whole).to_dense()
    return not bool((padded[rows:] != 0).any()) and not bool((padded[:, cols:] != 0).any())


def _present(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"the tensor {name!r} is missing")
    return tensors[name]


def _tensor(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    tensor = _present(tensors, name)
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, its layer needs {tuple(shape)}")
    return tensor


def _bits(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, int]) -> Tensor:
    """Returns the bool mask of a shape from a bit-packed tensor, after a check of the tensor."""
    return _bits_of(name, _tensor(tensors, name, (shape[0], -(-shape[1] // 8))), shape[1])


def _bits_of(name: str, bits: Tensor, cols: int) -> Tensor:
    if bits.dtype != torch.uint8:
        raise ValueError(f"{name} is {bits.dtype}, not uint8")
    mask = unpack_bits(bits, cols)
    if not torch.equal(pack_bits(mask), bits):
        raise ValueError(f"{name} has bits set past its last column")
    return mask
