"""The packed 2:4 layouts that GPUs multiply with: the values, then four bits per group in the tensor cores' order."""

import torch
from torch import Tensor

from ._define import check_ints, check_like, check_weight, define
from .bits import pack_bits, unpack_bits
from .sparse24 import Packed24, check_packed24, prune_pack24_reference

# The numbers that rows and columns must be multiples of.
MULTIPLES = {"cusparselt_sm80": (128, 128), "cusparselt_sm90": (64, 32), "cutlass_sm80": (32, 64)}


def _nibble_index(rows: int, cols: int, layout: str, device: torch.device) -> Tensor:
    """Returns, for each group, the index of the nibble of its metadata: ``[rows, cols / 4]``, low nibbles first."""
    r = torch.arange(rows, device=device).unsqueeze(1)
    g = torch.arange(cols // 4, device=device)
    if layout == "cusparselt_sm90":  # 64 rows by 32 columns in 256 bytes; rows r and r + 8 share a byte
        byte = r // 64 * 8 * cols + g // 8 * 256 + r % 64 // 16 * 64 + r % 8 * 8 + 2 * (g % 4) + g % 8 // 4
        return 2 * byte + r // 8 % 2
    # A word of 16 bits holds four groups. In a tile of 32 rows by two words, the rows go to eight lanes in turn; then
    # each square of two rows by two words is transposed.
    lane, word = r % 8 * 4 + r % 32 // 8, g // 4
    row, side = lane - lane % 2 + word % 2, lane % 2
    inside = 2 * row + side
    if layout == "cutlass_sm80":  # pairs of words, column-major
        first = 2 * rows * (word // 2) + r // 32 * 64
    else:  # cusparselt_sm80: 128 rows by 64 columns, column-major; in them 32 by 32, column-major
        first = g // 16 * 4 * rows + r // 128 * 512 + word // 2 % 2 * 256 + r % 128 // 32 * 64
    return 4 * (first + inside) + g % 4


def _codes(kept: Tensor) -> Tensor:
    """Returns the nibble of each group: the index of its first kept entry in the low two bits, of its last above."""
    b0, b1, b2, b3 = kept.unflatten(1, (kept.shape[1] // 4, 4)).to(torch.uint8).unbind(-1)
    first = (1 - b0) * (2 - b1)
    last = 3 - (1 - b3) * (2 - b2)
    return first | last << 2


def to_hardware24_reference(values: Tensor, bitmask: Tensor, cols: int, layout: str) -> Tensor:
    rows = values.shape[0]
    nibbles = torch.empty(rows * cols // 4, dtype=torch.uint8, device=values.device)
    nibbles[_nibble_index(rows, cols, layout, values.device).flatten()] = _codes(unpack_bits(bitmask, cols)).flatten()
    meta = nibbles[::2] | nibbles[1::2] << 4
    return torch.cat([values.flatten(), meta.view(values.dtype)])


def from_hardware24_reference(packed: Tensor, rows: int, cols: int, layout: str) -> tuple[Tensor, Tensor]:
    values, meta = packed.contiguous().split([rows * cols // 2, rows * cols // 16])
    meta = meta.view(torch.uint8)
    codes = torch.stack([meta & 15, meta >> 4], 1).flatten()[_nibble_index(rows, cols, layout, packed.device)]
    place = torch.arange(4, dtype=torch.uint8, device=packed.device)
    codes = codes.unsqueeze(-1)
    kept = ((codes & 3) == place) | ((codes >> 2) == place)
    return values.view(rows, cols // 2).clone(), pack_bits(kept.flatten(1))


def prune_to_hardware24_reference(weight: Tensor, scale: Tensor | None, layout: str) -> Tensor:
    return to_hardware24_reference(*prune_pack24_reference(weight, scale), weight.shape[1], layout)


def empty_packed(like: Tensor, rows: int, cols: int) -> Tensor:
    return like.new_empty(rows * cols // 16 * 9)


def _to_fake(values: Tensor, bitmask: Tensor, cols: int, layout: str) -> Tensor:
    return empty_packed(values, values.shape[0], cols)


def _from_fake(packed: Tensor, rows: int, cols: int, layout: str) -> tuple[Tensor, Tensor]:
    return packed.new_empty(rows, cols // 2), packed.new_empty(rows, cols // 8, dtype=torch.uint8)


def _prune_fake(weight: Tensor, scale: Tensor | None, layout: str) -> Tensor:
    return empty_packed(weight, *weight.shape)


_to_hardware24 = define(to_hardware24_reference, _to_fake, compiled=False)
_from_hardware24 = define(from_hardware24_reference, _from_fake, compiled=False)
_prune_to_hardware24 = define(prune_to_hardware24_reference, _prune_fake, compiled=False)


def hardware_multiple(layout: str) -> tuple[int, int]:
    """Returns the numbers that the rows and the columns of a weight must be multiples of in a hardware layout.

    Args:
        layout: ``"cusparselt_sm80"``, ``"cusparselt_sm90"`` or ``"cutlass_sm80"``, as in ``to_hardware24``.

    Raises:
        ValueError: no layout has this name.
    """
    if layout not in MULTIPLES:
        raise ValueError(f"layout must be one of {tuple(MULTIPLES)}, got {layout!r}")
    return MULTIPLES[layout]


@torch.no_grad()
def to_hardware24(packed: Packed24, layout: str) -> Tensor:
    """Rewrites a packed weight for a GPU's sparse tensor cores, on the device where it is.

    The layouts, by the library that reads them and the GPU it was made for:

    - ``"cusparselt_sm80"``: cuSPARSELt on Ampere and Ada; ``torch._sparse_semi_structured_tile`` writes it.
    - ``"cusparselt_sm90"``: cuSPARSELt on Hopper, where the metadata has another order.
    - ``"cutlass_sm80"``: CUTLASS 2.x, as ``torch.sparse.SparseSemiStructuredTensorCUTLASS`` holds it.

    All consist of the values, row-major, followed by the metadata: for each group of four the indices of its two kept
    entries, two bits each, the lower index first, in the order in which the tensor cores read them.

    Args:
        packed: a weight as ``pack24`` returns it, float16 or bfloat16. Outside autograd.
        layout: a layout of the list above; rows and columns must be multiples of ``hardware_multiple(layout)``.

    Returns:
        ``[rows * cols * 9 / 16]`` in the dtype of the weight: 9/16 of the dense bytes.

    Raises:
        TypeError: a wrong dtype.
        ValueError: an unknown layout, a shape that does not belong to it, or two devices.
    """
    check_packed24(packed)
    check_16bit("packed.values", packed.values, 2)
    check_shape(packed.shape, hardware_multiple(layout), layout)
    return _to_hardware24(packed.values, packed.bitmask, packed.shape[1], layout)


@torch.no_grad()
def from_hardware24(data: Tensor, shape: tuple[int, int], layout: str) -> Packed24:
    """Rebuilds the packed weight from a hardware layout of ``to_hardware24``.

    Args:
        data: ``[rows * cols * 9 / 16]``, float16 or bfloat16. Outside autograd.
        shape: rows and columns of the dense weight.
        layout: the layout that ``data`` has.

    Returns:
        The weight as ``pack24`` packs it, in the dtype of ``data``.

    Raises:
        TypeError: a wrong dtype.
        ValueError: an unknown layout, or a shape that does not belong to it.
    """
    check_16bit("data", data, 1)
    rows, cols = shape
    check_ints(rows=rows, cols=cols)
    check_shape((rows, cols), hardware_multiple(layout), layout)
    if data.shape[0] != rows * cols // 16 * 9:
        raise ValueError(
            f"data must have {rows * cols // 16 * 9} entries for a weight of {rows} x {cols}, got {data.shape[0]}"
        )
    values, bitmask = _from_hardware24(data, rows, cols, layout)
    return Packed24(values, bitmask, (rows, cols))


@torch.no_grad()
def prune_to_hardware24(weight: Tensor, layout: str, *, scale: Tensor | None = None) -> Tensor:
    """Prunes a weight to 2:4 straight into a hardware layout, in one pass.

    Equal to ``to_hardware24(prune_pack24(weight, scale=scale), layout)``.

    Args:
        weight: ``[rows, cols]``, float16 or bfloat16, any strides. Outside autograd.
        layout: a layout of ``to_hardware24``.
        scale: float32 ``[cols]``, one factor per input column; None ranks by magnitude alone.

    Returns:
        ``[rows * cols * 9 / 16]`` in the dtype of ``weight``.

    Raises:
        TypeError: a wrong dtype.
        ValueError: an unknown layout, a shape that does not belong to it, or a ``scale`` that is not ``[cols]``.
    """
    check_16bit("weight", weight, 2)
    check_shape(weight.shape, hardware_multiple(layout), layout)
    if scale is not None:
        check_like("scale", scale, torch.float32, weight.shape[1:], weight)
    return _prune_to_hardware24(weight, scale, layout)


def check_16bit(name: str, tensor: Tensor, dim: int) -> None:
    if isinstance(tensor, Tensor) and tensor.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"{name} must be float16 or bfloat16, got {tensor.dtype}")
    check_weight(name, tensor, dim)


def check_shape(shape: tuple[int, ...], multiple: tuple[int, int], layout: str) -> None:
    rows, cols = shape
    if rows < 0 or cols < 0 or rows % multiple[0] or cols % multiple[1]:
        needs = f"{layout} needs rows that are a multiple of {multiple[0]} and columns of {multiple[1]}"
        raise ValueError(f"{needs}, got {rows} x {cols}")
