"""The linear layer on a packed 2:4 weight."""

import torch
from torch import Tensor

from ._define import call_op, check_like, check_weight, define, define_gradient, linear_fp32
from .sparse24 import Packed24, _pack_at, _unpack24, check_packed24, unpack24_reference


def linear24_reference(x: Tensor, values: Tensor, bitmask: Tensor, bias: Tensor | None) -> Tensor:
    return linear_fp32(x, unpack24_reference(values, bitmask, x.shape[-1]), bias)


def _fake(x: Tensor, values: Tensor, bitmask: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0])


_linear24 = define(linear24_reference, _fake)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, values, bitmask, _ = inputs
    of_x, of_values, *_ = ctx.needs_input_grad
    ctx.cols = x.shape[-1]
    ctx.save_for_backward(x if of_values else None, values if of_x else None, bitmask if of_x or of_values else None)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
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


define_gradient(_linear24, _setup, _backward)


def linear24(x: Tensor, packed: Packed24, bias: Tensor | None = None) -> Tensor:
    """Computes ``x @ W.T + bias`` where ``W`` is given in its packed 2:4 form.

    Sums run in fp32 whatever the dtype. Differentiable in ``x``, ``packed.values`` and ``bias``. A dropped weight
    counts as 0, as in the dense product: times an input that is Inf or NaN it is NaN.

    The result of a token does not depend on the other tokens or on the number of threads, bit for bit, as long as the
    same kernel computes it. On a CPU another kernel runs from 16 tokens on; on a GPU, above 64 tokens, the weight is
    unpacked and PyTorch's dense product runs.

    Args:
        x: ``[..., cols]``, float32, float16 or bfloat16, any strides.
        packed: ``W``, ``[rows, cols]``, as ``pack24`` returns it, in ``x``'s dtype.
        bias: ``[rows]`` in ``x``'s dtype, or None.

    Returns:
        ``[..., rows]`` in ``x``'s dtype.

    Raises:
        TypeError: a wrong dtype, or dtypes that differ.
        ValueError: shapes that do not fit together, or two devices.
    """
    check_weight("x", x)
    check_packed24(packed, x)
    rows, cols = packed.shape
    if x.shape[-1] != cols:
        raise ValueError(f"x must have {cols} columns for a weight of {rows} x {cols}, got shape {tuple(x.shape)}")
    if bias is not None:
        check_like("bias", bias, x.dtype, (rows,), x)
    return call_op(_linear24, x, packed.values, packed.bitmask, bias)
