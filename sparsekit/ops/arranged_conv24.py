"""The convolution by a 2:4 weight in row pairs, in which its CPU product is fastest at AVX-512."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from . import row_pairs24
from ._conv import Pair, check_images, output_size, pad_unevenly, pair
from ._define import call_op, check_like, conv_fp32, define, define_gradient
from .arranged24 import Arranged24, arrange24, check_arranged24
from .bits import pack_bits, unpack_bits
from .conv24 import PackedConv24, check_packed_conv24, of_rows
from .sparse24 import Packed24, _unpack24, unpack24_reference


class ArrangedConv24(NamedTuple):
    """A convolution's 2:4 weight as ``arranged_conv2d24`` reads it, and nothing else.

    It is the weight ``[out, height * width * in]``, whose columns are the input channels of one tap after those of
    another, as ``arrange24`` arranges it in row pairs.

    Attributes:
        data: uint8, one dimension, about 5.5 bytes for every kept float32. Other bytes are undefined behavior.
        shape: the shape of the dense weight: output channels, input channels, and height and width of the kernel.
    """

    data: Tensor
    shape: tuple[int, int, int, int]

    @property
    def nbytes(self) -> int:
        """The bytes of the data."""
        return self.data.nbytes

    def to(self, device: torch.device | str) -> "ArrangedConv24":
        """Returns a copy of the weight on a device, or the same tensor if it is there."""
        return self._replace(data=self.data.to(device))

    def to_packed(self) -> PackedConv24:
        """Rebuilds the packed weight that was arranged, bit for bit.

        Raises:
            TypeError, ValueError: the fields do not fit together.
        """
        check_arranged_conv24(self)
        outputs, inputs, height, width = self.shape
        values, bitmask, (_, cols) = _as_matrix(self).to_packed()
        bits = unpack_bits(bitmask, cols).view(outputs, height * width, inputs)
        return PackedConv24(values.view(outputs, height * width, inputs // 2), pack_bits(bits), self.shape)

    def to_dense(self) -> Tensor:
        """Rebuilds the dense weight ``[out, in, height, width]``, contiguous, with zeros where nothing was kept.

        Raises:
            TypeError, ValueError: the fields do not fit together.
        """
        return self.to_packed().to_dense()


def _as_matrix(arranged: ArrangedConv24) -> Arranged24:
    """Returns the weight as one of a linear layer."""
    outputs, inputs, height, width = arranged.shape
    return Arranged24(arranged.data, (outputs, height * width * inputs), torch.float32, "row pairs")


@torch.no_grad()
def arrange_conv24(packed: PackedConv24) -> ArrangedConv24:
    """Arranges a convolution's packed 2:4 weight for inference on a CPU, as ``arranged_conv2d24`` reads it.

    The bytes do not depend on the machine or the number of threads.

    Args:
        packed: the weight, float32, with a multiple of four input channels; two bits are set in every group of its
            bitmask. It gets no gradient.

    Returns:
        The arranged weight; ``to_packed()`` rebuilds the packed one.

    Raises:
        TypeError: the weight is not float32.
        ValueError: another number of input channels, or shapes that do not fit together.
    """
    check_packed_conv24(packed)
    values, bitmask, (outputs, inputs, height, width) = packed
    if values.dtype != torch.float32:
        raise TypeError(f"packed.values must be float32 to be arranged, got {values.dtype}")
    if inputs % 4:
        raise ValueError(f"packed must have a multiple of four input channels to be arranged, got {inputs}")
    cols = height * width * inputs
    bits = pack_bits(unpack_bits(bitmask, inputs).reshape(outputs, cols))
    matrix = Packed24(values.reshape(outputs, cols // 2), bits, (outputs, cols))
    return ArrangedConv24(arrange24(matrix, "row pairs").data, packed.shape)


def arranged_conv2d24_reference(
    x: Tensor,
    data: Tensor,
    bias: Tensor | None,
    outputs: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    cols = kernel[0] * kernel[1] * x.shape[1]
    parts = row_pairs24.restore_row_pairs24_reference(data, outputs, cols, x.dtype)
    weight = of_rows(unpack24_reference(*parts, cols), (outputs, x.shape[1], *kernel))
    if weight.numel() == 0:  # F.conv2d rejects it
        y = torch.zeros_like(_fake(x, data, bias, outputs, kernel, stride, padding, dilation))
        return y if bias is None else y + bias[:, None, None]
    return conv_fp32(x, weight, bias, stride, padding, dilation)


def _fake(
    x: Tensor,
    data: Tensor,
    bias: Tensor | None,
    outputs: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    return x.new_empty(x.shape[0], outputs, *map(output_size, x.shape[2:], kernel, stride, padding, dilation))


_arranged_conv2d24 = define(arranged_conv2d24_reference, _fake)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, data, _, ctx.outputs, *ctx.geometry = inputs
    ctx.shape = x.shape
    ctx.save_for_backward(data if ctx.needs_input_grad[0] else None)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    kernel, *geometry = ctx.geometry
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        shape = (ctx.outputs, ctx.shape[1], *kernel)
        cols = kernel[0] * kernel[1] * shape[1]
        parts = row_pairs24._restore(ctx.saved_tensors[0], ctx.outputs, cols, torch.float32)
        grad_x = conv2d_input(ctx.shape, of_rows(_unpack24(*parts, cols), shape), grad, *geometry)
    if ctx.needs_input_grad[2]:
        grad_bias = grad.sum((0, 2, 3))
    return grad_x, None, grad_bias, None, None, None, None, None


define_gradient(_arranged_conv2d24, _setup, _backward)


def arranged_conv2d24(
    x: Tensor,
    arranged: ArrangedConv24,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
) -> Tensor:
    """Computes ``F.conv2d(x, W, bias, stride, padding, dilation)`` where ``W`` is arranged, as ``conv2d24`` does.

    Differentiable in ``x`` and ``bias``. A dropped weight counts as 0: times an input that is Inf or NaN it is NaN. The
    result of an image does not depend on the other images or on the number of threads, bit for bit.

    Args:
        x: float32 ``[images, in, height, width]`` or ``[in, height, width]``, any strides.
        arranged: ``W``, as ``arrange_conv24`` returns it.
        bias: float32 ``[out]``, or None.
        stride, padding, dilation: as ``conv2d24`` takes them.

    Returns:
        float32 ``[images, out, height, width]`` or ``[out, height, width]``, contiguous.

    Raises:
        TypeError: a wrong dtype.
        ValueError: shapes that do not fit together, an image that is smaller than the kernel, or two devices.
    """
    check_arranged_conv24(arranged)
    check_like("x", x, torch.float32, getattr(x, "shape", ()), arranged.data)
    outputs, inputs, *kernel = arranged.shape
    if bias is not None:
        check_like("bias", bias, torch.float32, (outputs,), x)
    strides, dilations = pair("stride", stride, 1), pair("dilation", dilation, 1)
    x, pads = pad_unevenly(x, kernel, strides, padding, dilations)
    check_images(x, inputs, kernel, strides, pads, dilations)
    images = x if x.dim() == 4 else x.unsqueeze(0)
    y = call_op(_arranged_conv2d24, images, arranged.data, bias, outputs, kernel, strides, pads, dilations)
    return y if x.dim() == 4 else y.squeeze(0)


def check_arranged_conv24(arranged: ArrangedConv24) -> None:
    """Rejects anything but an ``ArrangedConv24`` whose data has at least the bytes that its shape asks for.

    Does not read the data.
    """
    if not isinstance(arranged, ArrangedConv24):
        got = type(arranged).__name__
        raise TypeError(f"arranged must be an ArrangedConv24, as arrange_conv24 returns it, got {got}")
    shape = arranged.shape
    if len(shape) != 4 or min(shape[2:]) < 1 or shape[1] % 4:
        raise ValueError(
            "arranged.shape must be [out, in, height, width] with a multiple of four input channels and a kernel that "
            f"is not empty, got {tuple(shape)}"
        )
    check_arranged24(_as_matrix(arranged))
