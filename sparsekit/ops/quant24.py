"""The quantized 2:4 format: 8-bit or 4-bit codes, 16-bit scales, and one bit per entry."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._define import DTYPES, check_ints, check_like, define, no_autocast
from .sparse24 import Packed24, _unpack24, check_packed24, values_per_row

QUANT_TYPES = ("int8", "int4", "nf4")
# The quantiles of a normal distribution that QLoRA stores weights as, scaled to [-1, 1] with an exact 0: Dettmers et
# al., 2023, https://arxiv.org/abs/2305.14314, appendix E.
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
LARGEST_CODE = {"int8": 127, "int4": 7, "nf4": 1}  # the scale is the largest magnitude over this
ZERO_CODE = {"int8": 0, "int4": 0, "nf4": NF4_LEVELS.index(0)}


class QuantizedWeight24(NamedTuple):
    """A 2:4 weight whose kept values are codes of 8 or 4 bits that share a scale: 0.656 or 0.406 bytes a weight.

    A weight is its code times the scale of its row and its group of columns, the code being a number for ``"int8"`` and
    ``"int4"``, and the index of one of the 16 levels of QLoRA for ``"nf4"``. The tensors are plain ones: ``deepcopy``,
    ``torch.compile`` and pytrees see them.

    Attributes:
        values: the codes of the kept values, ``kept = 2 * (cols // 4) + cols % 4`` in a row. ``"int8"``: int8
            ``[rows, kept]``, from -127 to 127. ``"int4"``, from -7 to 7 in two's complement, and ``"nf4"``: uint8
            ``[rows, ceil(kept / 2)]``, two codes in a byte, the first one in the low bits; unused bits are 0.
        scales: bfloat16 ``[rows, ceil(cols / group)]``.
        bitmask: uint8 ``[rows, ceil(cols / 8)]``, as in ``Packed24``.
        shape: rows and columns of the dense weight.
        quant_type: ``"int8"``, ``"int4"`` or ``"nf4"``.
        group: how many columns share a scale, a multiple of 8.
        dtype: that of the weight before it was quantized, and of what ``to_dense`` returns.
    """

    values: Tensor
    scales: Tensor
    bitmask: Tensor
    shape: tuple[int, int]
    quant_type: str
    group: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """The bytes of the tensors."""
        return self.values.nbytes + self.scales.nbytes + self.bitmask.nbytes

    def to(self, device: torch.device | str) -> "QuantizedWeight24":
        """Returns a copy of the weight on a device, or the same tensors if they are there."""
        values, scales, bitmask = (each.to(device) for each in self[:3])
        return QuantizedWeight24(values, scales, bitmask, *self[3:])

    def to_packed24(self) -> Packed24:
        """Returns the weight with its kept values as numbers of ``dtype``.

        Raises:
            TypeError: a wrong dtype.
            ValueError: tensors that do not have the shapes that ``shape`` asks for, or are on two devices.
        """
        check_quantized24(self)
        with no_autocast(self.scales):
            values = dequantize(self.values, self.scales, self.shape[1], self.quant_type, self.group)
        return Packed24(values.to(self.dtype), self.bitmask, self.shape)

    def to_dense(self) -> Tensor:
        """Rebuilds the dense weight, with zeros where nothing was kept.

        Returns:
            ``[rows, cols]`` in ``dtype``, contiguous.

        Raises:
            TypeError: a wrong dtype.
            ValueError: tensors that do not have the shapes that ``shape`` asks for, or are on two devices.
        """
        values, bitmask, (_, cols) = self.to_packed24()
        return _unpack24(values, bitmask, cols)


def unpack_codes(values: Tensor, kept: int, quant_type: str) -> Tensor:
    """Returns one code in each entry: int8 ``[rows, kept]``, or uint8 from 0 to 15 for codes of 4 bits."""
    if quant_type == "int8":
        return values
    return torch.stack([values & 15, values >> 4], -1).flatten(-2)[..., :kept]


def pack_codes(codes: Tensor, quant_type: str) -> Tensor:
    """Stores what ``unpack_codes`` returns: codes of 4 bits two in a byte."""
    if quant_type == "int8":
        return codes
    codes = F.pad(codes, (0, codes.shape[-1] % 2)).unflatten(-1, ((codes.shape[-1] + 1) // 2, 2))
    return codes[..., 0] | codes[..., 1] << 4


def _stored(cols: int, quant_type: str) -> tuple[torch.dtype, int]:
    """Returns the dtype of stored codes, and how many entries of it a row takes."""
    kept = values_per_row(cols)
    return (torch.int8, kept) if quant_type == "int8" else (torch.uint8, -(-kept // 2))


def levels(quant_type: str, device: torch.device) -> Tensor:
    """Returns the number, float32, that each of the 16 codes of 4 bits stands for."""
    if quant_type == "nf4":
        return torch.tensor(NF4_LEVELS, dtype=torch.float32, device=device)
    codes = torch.arange(16, dtype=torch.float32, device=device)
    return torch.where(codes < 8, codes, codes - 16)


def _group_of_value(cols: int, group: int, device: torch.device) -> Tensor:
    """Returns the group of columns that each kept value of a row belongs to, the tail to the last one."""
    kept = torch.arange(values_per_row(cols), device=device)
    return (kept // (group // 2)).clamp(max=max(-(-cols // group) - 1, 0))


def dequantize(values: Tensor, scales: Tensor, cols: int, quant_type: str, group: int) -> Tensor:
    """Returns the kept values as numbers: float32 ``[rows, kept]``."""
    codes = unpack_codes(values, values_per_row(cols), quant_type)
    numbers = codes.float() if quant_type == "int8" else levels(quant_type, codes.device)[codes.long()]
    return numbers * scales.float()[:, _group_of_value(cols, group, scales.device)]


def _scales(largest: Tensor, code: int, dtype: torch.dtype) -> Tensor:
    """Returns ``largest / code`` rounded upward to bfloat16, but so that ``code`` times it is finite in ``dtype``."""
    rounded = ((largest / code).view(torch.int32) + 0xFFFF) & ~0xFFFF
    most = torch.tensor(torch.finfo(dtype).max / code, dtype=torch.float32, device=largest.device)
    return torch.minimum(rounded, most.view(torch.int32) & ~0xFFFF).view(torch.float32).bfloat16()


def quantize24_reference(values: Tensor, cols: int, quant_type: str, group: int) -> tuple[Tensor, Tensor]:
    index = _group_of_value(cols, group, values.device)
    largest = values.new_zeros(len(values), -(-cols // group), dtype=torch.float32)
    largest.scatter_reduce_(1, index.expand(len(values), -1), values.float().abs(), "amax")
    scales = _scales(largest.nan_to_num(torch.inf), LARGEST_CODE[quant_type], values.dtype)
    steps = torch.where(scales == 0, 1, scales).double()  # float64: a thread may flush small float32 to 0
    ratio = values.contiguous().double() / steps[:, index]
    ratio = torch.where(ratio.isnan(), 0, ratio)
    if quant_type == "nf4":
        exact = torch.tensor(NF4_LEVELS, dtype=torch.float64, device=values.device)
        codes = torch.bucketize(ratio, (exact[1:] + exact[:-1]) / 2).to(torch.uint8)
    else:
        most = LARGEST_CODE[quant_type]
        codes = ratio.round().clamp(-most, most).to(torch.int8)
        codes = codes if quant_type == "int8" else codes.view(torch.uint8) & 15
    return pack_codes(codes, quant_type).contiguous(), scales


def _quantize_fake(values: Tensor, cols: int, quant_type: str, group: int) -> tuple[Tensor, Tensor]:
    rows, (dtype, width) = values.shape[0], _stored(cols, quant_type)
    codes = values.new_empty(rows, width, dtype=dtype)
    return codes, values.new_empty(rows, -(-cols // group), dtype=torch.bfloat16)


_quantize24 = define(quantize24_reference, _quantize_fake)


@torch.no_grad()
def quantize24(
    packed: Packed24, quant_type: str = "int8", *, group: int = 64, check: bool | None = None
) -> QuantizedWeight24:
    """Quantizes the kept values of a 2:4 weight to 8 or 4 bits, each to the nearest number that a code stands for.

    Every row has a scale for each ``group`` of columns: the largest magnitude over 127 for ``"int8"``, over 7 for
    ``"int4"``, and itself for ``"nf4"``, rounded up to bfloat16 so that no value is clipped, unless it would overflow.
    Ties go to the even code, for ``"nf4"`` to the lower one. A value of 0 stays exactly 0.

    Args:
        packed: the weight, as ``pack24`` returns it. Not differentiable.
        quant_type: ``"int8"``, ``"int4"``, or ``"nf4"``, the levels of QLoRA (https://arxiv.org/abs/2305.14314), which
            are denser around 0.
        group: how many columns share a scale, a multiple of 8. Fewer columns are more exact and take more memory.
        check: whether to check that all values are finite. None, the default, checks on the CPU, and not on a GPU,
            where it would wait for the device; unchecked, a NaN becomes 0, and a group with an Inf or a NaN has the
            largest scale there is.

    Returns:
        The quantized weight; ``to_dense()`` rebuilds the dense one.

    Raises:
        TypeError: a wrong dtype.
        ValueError: an unknown ``quant_type``, a ``group`` that is no positive multiple of 8, wrong shapes; or, where
            checked, a value that is not finite.
    """
    check_packed24(packed)
    check_kind(quant_type, group)
    values, bitmask, (_, cols) = packed
    if (values.device.type == "cpu" if check is None else check) and not bool(values.isfinite().all()):
        raise ValueError("packed.values must be finite to be quantized, got an Inf or a NaN")
    codes, scales = _quantize24(values, cols, quant_type, group)
    return QuantizedWeight24(codes, scales, bitmask, packed.shape, quant_type, group, values.dtype)


def check_kind(quant_type: str, group: int) -> None:
    """Raises unless there is such a ``quant_type``, and ``group`` is a positive multiple of 8."""
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"quant_type must be one of {QUANT_TYPES}, got {quant_type!r}")
    check_ints(group=group)
    if group <= 0 or group % 8:
        raise ValueError(f"group must be a positive multiple of 8, got {group}")


def check_quantized24(packed: QuantizedWeight24, x: Tensor | None = None) -> None:
    """Rejects anything but a ``QuantizedWeight24`` whose tensors have the dtypes and shapes that its shape asks for.

    Does not read the bits. If ``x`` is given, the tensors must be on its device.
    """
    if not isinstance(packed, QuantizedWeight24):
        raise TypeError(f"packed must be a QuantizedWeight24, as quantize24 returns it, got {type(packed).__name__}")
    values, scales, bitmask, shape, quant_type, group, dtype = packed
    check_kind(quant_type, group)
    if len(shape) != 2:
        raise ValueError(f"packed.shape must be rows and columns, got {tuple(shape)}")
    if dtype not in DTYPES:
        raise TypeError(f"packed.dtype must be float32, float16 or bfloat16, got {dtype}")
    rows, cols = shape
    stored, width = _stored(cols, quant_type)
    like = scales if x is None else x
    check_like("packed.scales", scales, torch.bfloat16, (rows, -(-cols // group)), like)
    check_like("packed.values", values, stored, (rows, width), like)
    check_like("packed.bitmask", bitmask, torch.uint8, (rows, -(-cols // 8)), like)
