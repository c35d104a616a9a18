"""The packed 2:4 format: two values and four mask bits for every group of four weights."""

from typing import NamedTuple

import torch
from torch import Tensor

from ._define import call_op, check_like, check_weight, define, define_gradient
from .bits import nonzero, pack_bits, unpack_bits
from .nm import nm_prune_reference

# The two entries that a group with fewer than two non-zeros keeps, by its four non-zero bits, the lowest first. It is
# the rule of torch.sparse's semi-structured conversion, so that both pack a weight to the same bits.
_COMPLETE = {0b0000: 0b1100, 0b0001: 0b0101, 0b0010: 0b0110, 0b0100: 0b1100, 0b1000: 0b1100}


def values_per_row(cols: int) -> int:
    """Returns how many values a row of ``cols`` columns stores: two of every full group of four, and the whole tail."""
    return 2 * (cols // 4) + cols % 4


class Packed24(NamedTuple):
    """A 2:4 weight as its kept values and one bit per entry.

    The tensors are plain ones: ``deepcopy``, ``torch.compile`` and pytrees see them.

    Attributes:
        values: ``[rows, 2 * (cols // 4) + cols % 4]`` in the dtype of the weight: the kept values, row by row.
        bitmask: uint8 ``[rows, ceil(cols / 8)]``, a set bit for every kept entry, the lowest bit first; bits past the
            last column are 0. Two bits are set in every full group of four; otherwise results are undefined.
        shape: rows and columns of the dense weight.
    """

    values: Tensor
    bitmask: Tensor
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """The bytes of the tensors."""
        return self.values.nbytes + self.bitmask.nbytes

    def to(self, device: torch.device | str) -> "Packed24":
        """Returns a copy of the weight on a device, or the same tensors if they are there."""
        return Packed24(self.values.to(device), self.bitmask.to(device), self.shape)

    def to_dense(self) -> Tensor:
        """Rebuilds the dense weight, with zeros where nothing was kept.

        Differentiable in ``values``.

        Returns:
            ``[rows, cols]`` in the dtype of ``values``, contiguous.

        Raises:
            TypeError: a wrong dtype.
            ValueError: tensors that do not have the shapes that ``shape`` asks for, or are on two devices.
        """
        check_packed24(self)
        return call_op(_unpack24, self.values, self.bitmask, self.shape[1])


def pack24_reference(weight: Tensor, mask: Tensor | None, check: bool) -> tuple[Tensor, Tensor]:
    rows, cols = weight.shape
    full = cols // 4 * 4
    kept = nonzero(weight) if mask is None else mask.clone()
    kept[:, full:] = True
    groups = kept[:, :full].unflatten(1, (full // 4, 4))
    if check:
        _check_groups(groups, allowed=(2,) if mask is not None else (0, 1, 2))
    if mask is None:
        table = torch.tensor([_COMPLETE.get(bits, bits) for bits in range(16)], device=weight.device)
        weights = torch.tensor([1, 2, 4, 8], device=weight.device)
        bits = table[(groups * weights).sum(-1)]
        kept[:, :full] = (bits.unsqueeze(-1) & weights).bool().flatten(1)
    return weight[kept].view(rows, values_per_row(cols)), pack_bits(kept)


def _check_groups(groups: Tensor, allowed: tuple[int, ...]) -> None:
    count = groups.sum(-1)
    bad = ~torch.isin(count, torch.tensor(allowed, device=groups.device))
    if bad.any():
        row, group = (int(index) for index in bad.nonzero()[0])
        entries = "set mask entries" if allowed == (2,) else "non-zeros"
        raise ValueError(
            f"pack24: row {row}, columns {4 * group} to {4 * group + 3} have {int(count[row, group])} {entries}; "
            f"2:4 needs {'exactly' if allowed == (2,) else 'at most'} 2"
        )


def prune_pack24_reference(weight: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    return pack24_reference(weight, nm_prune_reference(weight, 2, 4, scale)[1], False)


def unpack24_reference(values: Tensor, bitmask: Tensor, cols: int) -> Tensor:
    kept = unpack_bits(bitmask, cols)
    rows = torch.arange(len(values), device=values.device)[:, None]
    # Indexing copies the bits; torch.gather changes those of a bfloat16 NaN.
    return torch.where(kept, values[rows, (kept.cumsum(1) - 1).clamp(min=0)], 0)


def _pack24_fake(weight: Tensor, mask: Tensor | None, check: bool = False) -> tuple[Tensor, Tensor]:
    rows, cols = weight.shape
    return weight.new_empty(rows, values_per_row(cols)), weight.new_empty(rows, -(-cols // 8), dtype=torch.uint8)


def _unpack24_fake(values: Tensor, bitmask: Tensor, cols: int) -> Tensor:
    return values.new_empty(values.shape[0], cols)


_pack24 = define(pack24_reference, _pack24_fake)
_prune_pack24 = define(prune_pack24_reference, _pack24_fake)
_unpack24 = define(unpack24_reference, _unpack24_fake)


def _pack_at(dense: Tensor, bitmask: Tensor) -> Tensor:
    """Returns the entries of ``dense`` that ``bitmask`` marks, in the layout of ``values``."""
    kept = dense.new_ones(dense.shape[0], values_per_row(dense.shape[1]))
    return _pack24(dense, _unpack24(kept, bitmask, dense.shape[1]) != 0, False)[0]


def _pack_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.cols = inputs[0].shape[1]
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _pack_backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    (bitmask,) = ctx.saved_tensors
    return _unpack24(grad, bitmask, ctx.cols), None, None


def _prune_pack_backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    return _pack_backward(ctx, grad, _)[:2]


def _unpack_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(inputs[1])


def _unpack_backward(ctx, grad):  # type: ignore[no-untyped-def]
    (bitmask,) = ctx.saved_tensors
    return _pack_at(grad, bitmask), None, None


define_gradient(_pack24, _pack_setup, _pack_backward)
define_gradient(_prune_pack24, _pack_setup, _prune_pack_backward)
define_gradient(_unpack24, _unpack_setup, _unpack_backward)


def pack24(weight: Tensor, mask: Tensor | None = None, *, check: bool | None = None) -> Packed24:
    """Packs a 2:4 weight into its kept values and one bit per entry: 9/16 of the bytes at 16 bits, 17/32 at 32.

    The layout is that of ``sparse-24-bitmask`` checkpoints. Without a mask the non-zeros are kept, and a group that
    has fewer than two is completed by the rule of ``torch.sparse.to_sparse_semi_structured``. A tail of ``cols % 4``
    columns is stored whole.

    Args:
        weight: ``[rows, cols]``, float32, float16 or bfloat16, any strides. Differentiable.
        mask: bool ``[rows, cols]`` with exactly two True in every full group of four; dropped entries are not stored.
        check: whether to check the 2:4 pattern. None, the default, checks on the CPU, where it is free, and not on a
            GPU, where it would wait for the device.

    Returns:
        The packed weight; ``packed.to_dense()`` rebuilds the dense one.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape or device; or, where checked, a group that breaks 2:4: the first one is named.
    """
    check_weight("weight", weight, 2)
    if mask is not None:
        check_like("mask", mask, torch.bool, weight.shape, weight)
    values, bitmask = _pack24(weight, mask, weight.device.type == "cpu" if check is None else check)
    return Packed24(values, bitmask, (weight.shape[0], weight.shape[1]))


def prune_pack24(weight: Tensor, *, scale: Tensor | None = None) -> Packed24:
    """Prunes a weight to 2:4 and packs what it keeps, in one pass that stores neither the mask nor the dense copy.

    Equal to ``pack24(weight, nm_prune(weight, 2, 4, scale=scale)[1])``: the same ranking, ties, layout and gradient.

    Args:
        weight: ``[rows, cols]``, float32, float16 or bfloat16, any strides. Gradients pass where the mask is True.
        scale: float32 ``[cols]``, one factor per input column; None ranks by magnitude alone.

    Returns:
        The packed weight, as ``pack24`` returns it.

    Raises:
        TypeError: a wrong dtype.
        ValueError: ``weight`` is not a matrix, or ``scale`` is not ``[cols]`` on its device.
    """
    check_weight("weight", weight, 2)
    if scale is not None:
        check_like("scale", scale, torch.float32, weight.shape[1:], weight)
    values, bitmask = _prune_pack24(weight, scale)
    return Packed24(values, bitmask, (weight.shape[0], weight.shape[1]))


def check_packed24(packed: Packed24, x: Tensor | None = None) -> None:
    """Rejects anything but a ``Packed24`` whose tensors have the dtypes and shapes that its shape asks for.

    Does not read the bits. If ``x`` is given, the tensors must be on its device, and the values must have its dtype.
    """
    if not isinstance(packed, Packed24):
        raise TypeError(f"packed must be a Packed24, as pack24 returns it, got {type(packed).__name__}")
    values, bitmask, shape = packed
    if len(shape) != 2:
        raise ValueError(f"packed.shape must be rows and columns, got {tuple(shape)}")
    rows, cols = shape
    check_weight("packed.values", values, 2)
    like = values if x is None else x
    check_like("packed.values", values, like.dtype, (rows, values_per_row(cols)), like)
    check_like("packed.bitmask", bitmask, torch.uint8, (rows, -(-cols // 8)), like)
