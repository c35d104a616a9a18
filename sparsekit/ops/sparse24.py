"""The packed 2:4 format: two values and four bits for every group of four weights."""

import torch
from torch import Tensor

from ._define import call_op, check_ints, check_like, check_weight, define, define_gradient, linear_fp32
from .bits import nonzero, pack_bits, unpack_bits
from .nm import nm_prune_reference

# What a group with fewer than two non-zeros keeps, by its four non-zero bits (lowest first): the completion that
# torch.sparse's semi-structured conversion uses, so both pack a weight to the same bits.
_COMPLETE = {0b0000: 0b1100, 0b0001: 0b0101, 0b0010: 0b0110, 0b0100: 0b1100, 0b1000: 0b1100}


def values_per_row(cols: int) -> int:
    """Stored values per row of ``cols`` columns: two of every full group of four, and the whole tail."""
    return 2 * (cols // 4) + cols % 4


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
    # An index copies bits; torch.gather gives a bfloat16 NaN other ones.
    return torch.where(kept, values[rows, (kept.cumsum(1) - 1).clamp(min=0)], 0)


def linear24_reference(x: Tensor, values: Tensor, bitmask: Tensor, bias: Tensor | None) -> Tensor:
    return linear_fp32(x, unpack24_reference(values, bitmask, x.shape[-1]), bias)


def _pack24_fake(weight: Tensor, mask: Tensor | None, check: bool = False) -> tuple[Tensor, Tensor]:
    rows, cols = weight.shape
    return weight.new_empty(rows, values_per_row(cols)), weight.new_empty(rows, -(-cols // 8), dtype=torch.uint8)


def _unpack24_fake(values: Tensor, bitmask: Tensor, cols: int) -> Tensor:
    return values.new_empty(values.shape[0], cols)


def _linear24_fake(x: Tensor, values: Tensor, bitmask: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0])


_pack24 = define(pack24_reference, _pack24_fake)
_prune_pack24 = define(prune_pack24_reference, _pack24_fake)
_unpack24 = define(unpack24_reference, _unpack24_fake)
_linear24 = define(linear24_reference, _linear24_fake)


def _pack_at(dense: Tensor, bitmask: Tensor) -> Tensor:
    """The entries of ``dense`` that ``bitmask`` marks, in the layout of ``values``."""
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


def _linear_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, values, bitmask, _ = inputs
    of_x, of_values, *_ = ctx.needs_input_grad
    ctx.cols = x.shape[-1]
    ctx.save_for_backward(x if of_values else None, values if of_x else None, bitmask if of_x or of_values else None)


def _linear_backward(ctx, grad):  # type: ignore[no-untyped-def]
    x, values, bitmask = ctx.saved_tensors
    tokens = torch.atleast_2d(grad).flatten(0, -2)  # [tokens, rows]
    grad_x = grad_values = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ _unpack24(values, bitmask, ctx.cols)
    if ctx.needs_input_grad[1]:
        grad_values = _pack_at(tokens.t() @ torch.atleast_2d(x).flatten(0, -2), bitmask)
    if ctx.needs_input_grad[3]:
        grad_bias = tokens.sum(0)
    return grad_x, grad_values, None, grad_bias


define_gradient(_pack24, _pack_setup, _pack_backward)
define_gradient(_prune_pack24, _pack_setup, _prune_pack_backward)
define_gradient(_unpack24, _unpack_setup, _unpack_backward)
define_gradient(_linear24, _linear_setup, _linear_backward)


def pack24(weight: Tensor, mask: Tensor | None = None, *, check: bool | None = None) -> tuple[Tensor, Tensor]:
    """Packs a 2:4 weight into its kept values and one bit per entry: 9/16 of the bytes at 16 bits, 17/32 at 32.

    The layout is that of ``sparse-24-bitmask`` checkpoints. Without a mask the non-zeros are kept, and a group that
    has fewer than two is completed by the rule of ``torch.sparse.to_sparse_semi_structured``. A tail of ``cols % 4``
    columns is stored whole.

    Args:
        weight: ``[rows, cols]``, float32, float16 or bfloat16, any strides. Differentiable.
        mask: bool ``[rows, cols]`` with exactly two True in every full group of four; what it drops is not stored.
        check: whether to check the 2:4 pattern. None, the default, checks on the CPU, where it is free, and not on a
            GPU, where it would wait for the device.

    Returns:
        ``(values, bitmask)``: ``[rows, 2 * (cols // 4) + cols % 4]`` in ``weight``'s dtype, and uint8
        ``[rows, ceil(cols / 8)]``, the lowest bit first, bits past the last column 0.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape or device; or, where checked, a group that breaks 2:4: the first one is named.
    """
    check_weight("weight", weight, 2)
    if mask is not None:
        check_like("mask", mask, torch.bool, weight.shape, weight)
    return _pack24(weight, mask, weight.device.type == "cpu" if check is None else check)


def prune_pack24(weight: Tensor, *, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Prunes a weight to 2:4 and packs what it keeps, in one pass that stores neither the mask nor the dense copy.

    Equal to ``pack24(weight, nm_prune(weight, 2, 4, scale=scale)[1])``: the same ranking, ties, layout and gradient.

    Args:
        weight: ``[rows, cols]``, float32, float16 or bfloat16, any strides. Gradients pass where the mask is True.
        scale: float32 ``[cols]``, one factor per input column; None ranks by magnitude alone.

    Returns:
        ``(values, bitmask)`` as ``pack24`` returns them.

    Raises:
        TypeError: a wrong dtype.
        ValueError: ``weight`` is not a matrix, or ``scale`` is not ``[cols]`` on its device.
    """
    check_weight("weight", weight, 2)
    if scale is not None:
        check_like("scale", scale, torch.float32, weight.shape[1:], weight)
    return _prune_pack24(weight, scale)


def unpack24(values: Tensor, bitmask: Tensor, cols: int) -> Tensor:
    """Rebuilds the dense weight that ``pack24`` packed, with zeros where nothing was kept.

    Args:
        values: ``[rows, 2 * (cols // 4) + cols % 4]``, float32, float16 or bfloat16. Differentiable.
        bitmask: uint8 ``[rows, ceil(cols / 8)]`` with two bits set in every full group of four.
        cols: columns of the dense weight.

    Returns:
        ``[rows, cols]`` in the dtype of ``values``, contiguous.

    Raises:
        TypeError: a wrong dtype.
        ValueError: shapes that do not belong to ``cols``, or two devices.
    """
    _check_packed(values, bitmask, cols)
    return call_op(_unpack24, values, bitmask, cols)


def linear24(x: Tensor, values: Tensor, bitmask: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes ``x @ W.T + bias`` straight from the packed form of ``W``.

    Sums run in fp32 whatever the dtype. Differentiable in ``x``, ``values`` and ``bias``. A dropped weight counts as 0,
    as in the dense product: times an input that is Inf or NaN it is NaN.

    A token's result has the same bits whatever other tokens come with it and however many threads run, as long as the
    same kernel answers. Which one does changes at 16 tokens on a CPU, and past 64 on a GPU, where PyTorch's dense
    product takes the unpacked weight.

    Args:
        x: ``[..., cols]``, float32, float16 or bfloat16, any strides.
        values: ``[rows, 2 * (cols // 4) + cols % 4]`` as ``pack24`` returns them, of ``x``'s dtype.
        bitmask: uint8 ``[rows, ceil(cols / 8)]`` with two bits set in every full group of four; with others the result
            means nothing.
        bias: ``[rows]`` of ``x``'s dtype, or None.

    Returns:
        ``[..., rows]`` in ``x``'s dtype.

    Raises:
        TypeError: a wrong dtype, or dtypes that differ.
        ValueError: shapes that do not fit together, or two devices.
    """
    check_weight("x", x)
    _check_packed(values, bitmask, x.shape[-1])
    check_like("values", values, x.dtype, values.shape, x)
    if bias is not None:
        check_like("bias", bias, x.dtype, values.shape[:1], x)
    return call_op(_linear24, x, values, bitmask, bias)


def _check_packed(values: Tensor, bitmask: Tensor, cols: int) -> None:
    check_weight("values", values, 2)
    check_ints(cols=cols)
    if cols < 0 or values.shape[1] != values_per_row(cols):
        raise ValueError(
            f"values must have {values_per_row(cols)} columns for a weight of {cols}, got shape {tuple(values.shape)}"
        )
    check_like("bitmask", bitmask, torch.uint8, (values.shape[0], -(-cols // 8)), values)
