"""Dense convolution with a weight that oneDNN has reordered once, as in ``prepacked``."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input

from ._conv import check_images, output_size
from ._define import call_op, define, define_gradient
from .prepacked import prepacked_dense


def prepacked_conv2d_reference(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    channels_last: bool,
) -> Tensor:
    if not packed.is_mkldnn or torch._C._are_functorch_transforms_active():
        y = F.conv2d(x, prepacked_dense(packed), bias, stride, padding, dilation)
    else:
        geometry = list(padding), list(stride), list(dilation)
        y = torch.ops.mkldnn._convolution_pointwise.default(x, packed, bias, *geometry, 1, "none", [], "")
    return y.contiguous(memory_format=_memory_format(channels_last))  # oneDNN returns channels last


def _memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _fake(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    channels_last: bool,
) -> Tensor:
    sizes = map(output_size, x.shape[2:], packed.shape[2:], stride, padding, dilation)
    return torch.empty(
        (x.shape[0], packed.shape[0], *sizes),
        dtype=x.dtype,
        device=x.device,
        memory_format=_memory_format(channels_last),
    )


_prepacked_conv2d = define(prepacked_conv2d_reference, _fake, compiled=False)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, packed, _, *ctx.geometry, _ = inputs
    ctx.shape = x.shape
    ctx.save_for_backward(packed if ctx.needs_input_grad[0] else None)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    (packed,) = ctx.saved_tensors
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = conv2d_input(ctx.shape, prepacked_dense(packed), grad, *ctx.geometry)
    grad_bias = grad.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
    return grad_x, None, grad_bias, None, None, None, None


define_gradient(_prepacked_conv2d, _setup, _backward)


def prepack_conv2d(
    weight: Tensor, images: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Reorders a convolution's dense weight for oneDNN, or returns it as it is where oneDNN has no form for it.

    Args:
        weight: ``[out, in, height, width]``.
        images: how many the layout is chosen for, and their height and width.
        stride, padding, dilation: two numbers each.

    Returns:
        An opaque tensor (``is_mkldnn``) with ``weight``'s shape and dtype, or ``weight``, contiguous.
    """
    weight = weight.detach().contiguous()
    if weight.device.type != "cpu" or weight.numel() == 0 or not torch.backends.mkldnn.is_available():
        return weight
    count, *size = images
    shape = [count, weight.shape[1], *size]
    try:
        return torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, 1, shape)
    except RuntimeError:  # how oneDNN refuses a dtype that the CPU lacks
        return weight


def prepacked_conv2d(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    channels_last: bool,
) -> Tensor:
    """Computes ``F.conv2d`` from the opaque form of a weight; differentiable in ``x`` and ``bias``, not in the weight.

    Args:
        x: ``[images, in, height, width]`` or ``[in, height, width]`` of the weight's dtype, any strides.
        packed: what ``prepack_conv2d`` returned, reordered.
        bias: ``[out]`` or None.
        stride, padding, dilation: two numbers each.
        channels_last: whether the result lies in memory position by position, not channel by channel.

    Raises:
        TypeError: ``x`` has another dtype.
        ValueError: ``x`` has another number of channels, or is smaller than the kernel.
    """
    if x.dtype != packed.dtype:
        raise TypeError(f"x must be {packed.dtype} as the weight is, got {x.dtype}")
    check_images(x, packed.shape[1], packed.shape[2:], stride, padding, dilation)
    images = x if x.dim() == 4 else x.unsqueeze(0)
    y = call_op(_prepacked_conv2d, images, packed, bias, stride, padding, dilation, channels_last)
    return y if x.dim() == 4 else y.squeeze(0)
