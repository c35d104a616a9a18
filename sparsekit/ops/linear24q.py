"""The linear layer on a quantized 2:4 weight."""

from collections.abc import Callable

import torch
from torch import Tensor

from ._define import call_op, check_like, check_weight, define, define_gradient, linear_fp32
from .quant24 import QuantizedWeight24, check_quantized24, dequantize
from .sparse24 import _unpack24, unpack24_reference


def linear24q_reference(
    x: Tensor, values: Tensor, scales: Tensor, bitmask: Tensor, bias: Tensor | None, quant_type: str, group: int
) -> Tensor:
    cols = x.shape[-1]
    numbers = dequantize(values, scales, cols, quant_type, group)
    return linear_fp32(x, unpack24_reference(numbers, bitmask, cols), bias)


def _fake(
    x: Tensor, values: Tensor, scales: Tensor, bitmask: Tensor, bias: Tensor | None, quant_type: str, group: int
) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0])


_linear24q = define(linear24q_reference, _fake)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, values, scales, bitmask, _, *ctx.kind = inputs
    ctx.cols = x.shape[-1]
    ctx.save_for_backward(*((values, scales, bitmask) if ctx.needs_input_grad[0] else (None, None, None)))


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    values, scales, bitmask = ctx.saved_tensors

    def weight() -> Tensor:
        return _unpack24(dequantize(values, scales, ctx.cols, *ctx.kind), bitmask, ctx.cols)

    of_x, _, _, _, of_bias, *_ = ctx.needs_input_grad
    grad_x, grad_bias = gradients(grad, weight if of_x else None, of_bias)
    return grad_x, None, None, None, grad_bias, None, None


def gradients(grad: Tensor, weight: Callable[[], Tensor] | None, of_bias: bool) -> tuple[Tensor | None, Tensor | None]:
    """Returns the gradients of ``x``, if its float32 weight is given, and of the bias of a product."""
    grad_x = None if weight is None else (grad.float() @ weight()).to(grad.dtype)
    return grad_x, torch.atleast_2d(grad).flatten(0, -2).sum(0) if of_bias else None


define_gradient(_linear24q, _setup, _backward)


def linear24q(x: Tensor, packed: QuantizedWeight24, bias: Tensor | None = None) -> Tensor:
    """Computes ``x @ W.T + bias`` where ``W`` is given in its quantized 2:4 form, and ``x`` stays as it is.

    Weights are codes times scales, unrounded, and sums run in fp32, whatever the dtype. Differentiable in ``x`` and
    ``bias``. A dropped weight counts as 0, as in the dense product: times an input that is Inf or NaN it is NaN.

    The result of a token does not depend on the other tokens or on the number of threads, bit for bit, as long as the
    same kernel computes it; on a CPU another kernel runs from 16 tokens on, on a GPU from 17 and from 33. On a CPU
    ``linear24q_int8`` is faster, and rounds ``x`` to 8 bits.

    Args:
        x: ``[..., cols]``, float32, float16 or bfloat16, any strides.
        packed: ``W``, ``[rows, cols]``, as ``quantize24`` returns it, of any ``dtype``.
        bias: ``[rows]`` in ``x``'s dtype, or None.

    Returns:
        ``[..., rows]`` in ``x``'s dtype.

    Raises:
        TypeError: a wrong dtype, or dtypes that differ.
        ValueError: shapes that do not fit together, or two devices.
    """
    check_weight("x", x)
    check_quantized24(packed, x)
    rows, cols = packed.shape
    check_product(x, bias, rows, cols)
    return call_op(_linear24q, x, packed.values, packed.scales, packed.bitmask, bias, packed.quant_type, packed.group)


def check_product(x: Tensor, bias: Tensor | None, rows: int, cols: int) -> None:
    """Raises unless ``x`` has the columns of a weight of ``rows`` x ``cols``, and ``bias`` its rows."""
    if x.shape[-1] != cols:
        raise ValueError(f"x must have {cols} columns for a weight of {rows} x {cols}, got shape {tuple(x.shape)}")
    if bias is not None:
        check_like("bias", bias, x.dtype, (rows,), x)
