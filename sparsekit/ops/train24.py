"""The two steps of a linear layer in sparse training: pruning its weight, and multiplying by the packed weight."""

import torch
from torch import Tensor

from ._define import check_like, check_weight, define, define_gradient
from .hardware24 import _prune_to_hardware24
from .hardware24_both import _prune_both_to_hardware24
from .hardware_linear24 import _hardware_linear24
from .nm import _nm_prune
from .transposable import _transposable_mask24


def train_prune24_reference(weight: Tensor, transposable: bool, decay: float) -> Tensor:
    if transposable:
        return torch.where(_transposable_mask24(weight), weight, 0).contiguous()
    return _nm_prune(weight, 2, 4, None)[0]


def train_linear24_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, transposable: bool, layout: str
) -> tuple[Tensor, Tensor]:
    if transposable:
        packed, packed_t, _ = _prune_both_to_hardware24(weight, layout)
    else:
        packed, packed_t = _prune_to_hardware24(weight, None, layout), weight.new_empty(0)
    return _product(x, packed, bias, weight.shape[0], layout), packed_t


def _product(x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, layout: str) -> Tensor:
    return _hardware_linear24(x, packed, bias, rows, layout, 0, 1, -1)


def _prune_fake(weight: Tensor, transposable: bool, decay: float) -> Tensor:
    return weight.new_empty(weight.shape)


def _linear_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, transposable: bool, layout: str
) -> tuple[Tensor, Tensor]:
    rows, cols = weight.shape
    return x.new_empty(*x.shape[:-1], rows), weight.new_empty(rows * cols // 16 * 9 if transposable else 0)


_train_prune24 = define(train_prune24_reference, _prune_fake, compiled=False)
_train_linear24 = define(train_linear24_reference, _linear_fake, compiled=False)


def _prune_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    weight, _, ctx.decay = inputs
    if ctx.decay:
        ctx.save_for_backward(weight, output)


def _prune_backward(ctx, grad):  # type: ignore[no-untyped-def]
    if ctx.decay:
        weight, pruned = ctx.saved_tensors
        grad = torch.add(grad, weight - pruned, alpha=ctx.decay)
    return grad, None, None


def _linear_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, _, ctx.transposable, ctx.layout = inputs
    ctx.cols = x.shape[-1]
    ctx.mark_non_differentiable(output[1])
    # The gradient of each needs the other: for a frozen weight, no activations are kept.
    wants_x, wants_weight = ctx.needs_input_grad[:2]
    other = output[1] if ctx.transposable else weight
    ctx.save_for_backward(x if wants_weight else None, other if wants_x else None)


def _linear_backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    x, other = ctx.saved_tensors
    grad_x = grad_weight = grad_bias = None
    tokens = grad.reshape(-1, grad.shape[-1])  # [tokens, rows]
    if ctx.needs_input_grad[0] and ctx.transposable:
        if torch.is_grad_enabled():
            raise RuntimeError("train_linear24 has no second gradients with transposable masks")
        grad_x = _product(grad, other, None, ctx.cols, ctx.layout)
    elif ctx.needs_input_grad[0]:
        grad_x = grad @ other
    if ctx.needs_input_grad[1]:
        grad_weight = tokens.t() @ x.reshape(-1, ctx.cols)
    if ctx.needs_input_grad[2]:
        grad_bias = tokens.sum(0)
    return grad_x, grad_weight, grad_bias, None, None


define_gradient(_train_prune24, _prune_setup, _prune_backward)
define_gradient(_train_linear24, _linear_setup, _linear_backward)


def train_prune24(weight: Tensor, *, transposable: bool = False, decay: float = 0.0) -> Tensor:
    """Zeroes what the 2:4 mask of a weight drops; the gradient also reaches the dropped entries.

    Args:
        weight: ``[rows, cols]``, float32, float16 or bfloat16, any strides.
        transposable: whether the mask is that of ``transposable_mask24``; else that of ``nm_mask(weight, 2, 4)``.
        decay: ``decay * weight`` is added to the gradient of dropped entries (SR-STE,
            https://arxiv.org/abs/2102.04010).

    Returns:
        The pruned weight, contiguous.
    """
    return _train_prune24(weight, transposable, decay)


def train_linear24(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, transposable: bool = False, layout: str
) -> Tensor:
    """Computes ``x @ pruned.T + bias`` in a hardware layout, where ``pruned`` is ``train_prune24(weight)``.

    The gradient of ``x`` is computed in the layout too where the mask is transposable, else by a dense product. The
    gradient of ``weight`` is ``grad.T @ x``, dense.

    Args:
        x: ``[..., cols]``, float16 or bfloat16, any strides.
        weight: ``[rows, cols]`` of ``x``'s dtype, whose sides are multiples of ``hardware_multiple(layout)``, or of
            the larger of both numbers if the mask is transposable. If it is not, the weight must already be 2:4.
        bias: ``[rows]`` of ``x``'s dtype, or None.
        transposable: as in ``train_prune24``.
        layout: a layout of ``to_hardware24`` that is one of the device's ``hardware_layouts``.

    Returns:
        ``[..., rows]`` in ``x``'s dtype.

    Raises:
        TypeError: a wrong dtype, or dtypes that differ.
        ValueError: shapes that do not fit together, or two devices.
    """
    check_weight("x", x)
    check_weight("weight", weight, 2)
    check_like("weight", weight, x.dtype, (weight.shape[0], x.shape[-1]), x)
    if bias is not None:
        check_like("bias", bias, x.dtype, weight.shape[:1], x)
    return _train_linear24(x, weight, bias, transposable, layout)[0]
