"""The convolution whose weight is 2:4 along the input channels, at each of its taps."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from ._conv import Pair, check_images, output_size, pad_unevenly, pair
from ._define import call_op, check_like, check_weight, conv_fp32, define, define_gradient
from .bits import nonzero
from .sparse24 import _pack24, _pack_at, _unpack24, unpack24_reference, values_per_row


class PackedConv24(NamedTuple):
    """A convolution's weight as its kept values and one bit per entry, 2:4 along the input channels at each tap.

    A tap is one position ``(y, x)`` of the kernel. Every row, which is one tap of one output channel, is packed as
    ``Packed24`` packs it. The tensors are plain ones: ``deepcopy``, ``torch.compile`` and pytrees see them.

    Attributes:
        values: ``[out, height * width, 2 * (in // 4) + in % 4]`` in the dtype of the weight: the kept values.
        bitmask: uint8 ``[out, height * width, ceil(in / 8)]``, a set bit for every kept entry, the lowest bit first;
            bits past the last channel are 0. Two bits are set in every full group of four; otherwise results are
            undefined.
        shape: the shape of the dense weight: output channels, input channels, and height and width of the kernel.
    """

    values: Tensor
    bitmask: Tensor
    shape: tuple[int, int, int, int]

    @property
    def nbytes(self) -> int:
        """The bytes of the tensors."""
        return self.values.nbytes + self.bitmask.nbytes

    def to(self, device: torch.device | str) -> "PackedConv24":
        """Returns a copy of the weight on a device, or the same tensors if they are there."""
        return PackedConv24(self.values.to(device), self.bitmask.to(device), self.shape)

    def to_dense(self) -> Tensor:
        """Rebuilds the dense weight, with zeros where nothing was kept.

        Differentiable in ``values``.

        Returns:
            ``[out, in, height, width]`` in the dtype of ``values``, contiguous.

        Raises:
            TypeError: a wrong dtype.
            ValueError: tensors that do not have the shapes that ``shape`` asks for, or are on two devices.
        """
        check_packed_conv24(self)
        return of_rows(call_op(_unpack24, *_as_rows(self.values, self.bitmask), self.shape[1]), self.shape)


def _to_rows(weight: Tensor) -> Tensor:
    """Returns ``[out, in, height, width]`` as ``[out * height * width, in]``: a row for every tap."""
    return weight.permute(0, 2, 3, 1).flatten(0, 2)


def of_rows(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns the weight ``[out, in, height, width]``, contiguous, given a row for every tap, or one of all taps."""
    outputs, inputs, height, width = shape
    return rows.reshape(outputs, height, width, inputs).permute(0, 3, 1, 2).contiguous()


def _as_rows(values: Tensor, bitmask: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the tensors of a packed convolution as those of a ``Packed24``, which has a row for every tap."""
    return values.flatten(0, 1), bitmask.flatten(0, 1)


def conv2d24_reference(
    x: Tensor,
    values: Tensor,
    bitmask: Tensor,
    bias: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    shape = (values.shape[0], x.shape[1], *kernel)
    weight = of_rows(unpack24_reference(*_as_rows(values, bitmask), x.shape[1]), shape)
    if weight.numel() == 0:  # F.conv2d rejects it
        y = torch.zeros_like(_fake(x, values, bitmask, bias, kernel, stride, padding, dilation))
        return y if bias is None else y + bias[:, None, None]
    return conv_fp32(x, weight, bias, stride, padding, dilation)


def _fake(
    x: Tensor,
    values: Tensor,
    bitmask: Tensor,
    bias: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    sizes = map(output_size, x.shape[2:], kernel, stride, padding, dilation)
    return x.new_empty(x.shape[0], values.shape[0], *sizes)


_conv2d24 = define(conv2d24_reference, _fake)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, values, bitmask, _, *ctx.geometry = inputs
    of_x, of_values, *_ = ctx.needs_input_grad
    ctx.shape = x.shape
    ctx.save_for_backward(x if of_values else None, values if of_x else None, bitmask if of_x or of_values else None)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    x, values, bitmask = ctx.saved_tensors
    kernel, *geometry = ctx.geometry
    grad_x = grad_values = grad_bias = None
    if ctx.needs_input_grad[0]:
        shape = (values.shape[0], ctx.shape[1], *kernel)
        weight = of_rows(_unpack24(*_as_rows(values, bitmask), ctx.shape[1]), shape)
        grad_x = conv2d_input(ctx.shape, weight, grad, *geometry)
    if ctx.needs_input_grad[1]:
        shape = (bitmask.shape[0], ctx.shape[1], *kernel)
        dense = conv2d_weight(x, shape, grad, *geometry)
        grad_values = _pack_at(_to_rows(dense), bitmask.flatten(0, 1)).unflatten(0, bitmask.shape[:2])
    if ctx.needs_input_grad[3]:
        grad_bias = grad.sum((0, 2, 3))
    return grad_x, grad_values, None, grad_bias, None, None, None, None


define_gradient(_conv2d24, _setup, _backward)


def pack_conv24(weight: Tensor, mask: Tensor | None = None, *, check: bool | None = None) -> PackedConv24:
    """Packs a convolution's weight that is 2:4 along its input channels, at each tap of the kernel.

    These are the masks that ``prune_`` makes by default; those of ``axis="flatten"`` cannot be packed. Without a mask
    the non-zeros are kept, and a group that has fewer than two is completed as ``pack24`` does. The last ``in % 4``
    channels are stored whole.

    Args:
        weight: ``[out, in, height, width]``, float32, float16 or bfloat16, any strides. Differentiable.
        mask: bool of the same shape with exactly two True in every full group of four; dropped entries are not stored.
        check: whether to check the 2:4 pattern. None, the default, checks on the CPU, and not on a GPU, where it would
            wait for the device.

    Returns:
        The packed weight; ``packed.to_dense()`` rebuilds the dense one.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape or device; or, where checked, a group that breaks 2:4: the first one is named.
    """
    check_weight("weight", weight, 4)
    if mask is not None:
        check_like("mask", mask, torch.bool, weight.shape, weight)
    if weight.device.type == "cpu" if check is None else check:
        _check_groups(weight, mask)
    outputs, inputs, height, width = weight.shape
    values, bitmask = _pack24(_to_rows(weight), None if mask is None else _to_rows(mask), False)
    by_tap = (outputs, height * width)
    return PackedConv24(values.unflatten(0, by_tap), bitmask.unflatten(0, by_tap), (outputs, inputs, height, width))


def _check_groups(weight: Tensor, mask: Tensor | None) -> None:
    kept = nonzero(weight.detach()) if mask is None else mask
    full = weight.shape[1] // 4
    count = kept[:, : 4 * full].unflatten(1, (full, 4)).sum(2)
    bad = count > 2 if mask is None else count != 2
    if bad.any():
        output, group, y, x = (int(index) for index in bad.nonzero()[0])
        entries, allowed = ("non-zeros", "at most") if mask is None else ("set mask entries", "exactly")
        raise ValueError(
            f"pack_conv24: output channel {output}, input channels {4 * group} to {4 * group + 3}, tap ({y}, {x}) have "
            f"{int(count[output, group, y, x])} {entries}; 2:4 needs {allowed} 2"
        )


def conv2d24(
    x: Tensor,
    packed: PackedConv24,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
) -> Tensor:
    """Computes ``F.conv2d(x, W, bias, stride, padding, dilation)`` where ``W`` is given in its packed 2:4 form.

    Sums run in fp32 whatever the dtype. Differentiable in ``x``, ``packed.values`` and ``bias``. A dropped weight
    counts as 0, as in the dense convolution: times an input that is Inf or NaN it is NaN.

    Args:
        x: ``[images, in, height, width]`` or ``[in, height, width]``, float32, float16 or bfloat16, any strides.
        packed: ``W``, as ``pack_conv24`` returns it, in ``x``'s dtype.
        bias: ``[out]`` in ``x``'s dtype, or None.
        stride: one number, or one for each of height and width.
        padding: how many zeros are around the image, likewise; or ``"valid"``, none; or ``"same"``, as many as make the
            output as large as the image, which needs a stride of 1.
        dilation: the distance between two taps, as ``stride``.

    Returns:
        ``[images, out, height, width]`` or ``[out, height, width]`` in ``x``'s dtype, contiguous.

    Raises:
        TypeError: a wrong dtype, or dtypes that differ.
        ValueError: shapes that do not fit together, an image that is smaller than the kernel, or two devices.
    """
    check_weight("x", x)
    check_packed_conv24(packed, x)
    outputs, inputs, *kernel = packed.shape
    if bias is not None:
        check_like("bias", bias, x.dtype, (outputs,), x)
    strides, dilations = pair("stride", stride, 1), pair("dilation", dilation, 1)
    x, pads = pad_unevenly(x, kernel, strides, padding, dilations)
    check_images(x, inputs, kernel, strides, pads, dilations)
    images = x if x.dim() == 4 else x.unsqueeze(0)
    y = call_op(_conv2d24, images, packed.values, packed.bitmask, bias, kernel, strides, pads, dilations)
    return y if x.dim() == 4 else y.squeeze(0)


def check_packed_conv24(packed: PackedConv24, x: Tensor | None = None) -> None:
    """Rejects anything but a ``PackedConv24`` whose tensors have the dtypes and shapes that its shape asks for.

    Does not read the bits. If ``x`` is given, the tensors must be on its device, and the values must have its dtype.
    """
    if not isinstance(packed, PackedConv24):
        raise TypeError(f"packed must be a PackedConv24, as pack_conv24 returns it, got {type(packed).__name__}")
    values, bitmask, shape = packed
    if len(shape) != 4 or min(shape[2:]) < 1:
        raise ValueError(f"packed.shape must be [out, in, height, width] with a kernel that is not empty, got {shape}")
    outputs, inputs, height, width = shape
    check_weight("packed.values", values, 3)
    like = values if x is None else x
    check_like("packed.values", values, like.dtype, (outputs, height * width, values_per_row(inputs)), like)
    check_like("packed.bitmask", bitmask, torch.uint8, (outputs, height * width, -(-inputs // 8)), like)
