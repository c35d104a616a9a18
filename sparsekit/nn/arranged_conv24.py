"""The 2:4 convolution whose weight is arranged for a CPU."""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..ops import ArrangedConv24, PackedConv24, arrange_conv24, arranged_conv2d24, backends
from ..ops._conv import pads_of
from ..ops._define import can_call_directly
from ..ops._kernels import call_kernel
from ..ops.conv24 import check_packed_conv24
from .arranged import Arranged
from .common import autocast_dtype, carry_mask
from .compressed_conv import CompressedConv2d, strides_of
from .conv24 import Conv2d24

CONVOLUTION = torch.ops.sparsekit.arranged_conv2d24.default
Layer = TypeVar("Layer", bound="ArrangedConv2d24")


class ArrangedConv2d24(Arranged, Conv2d24):  # type: ignore[override, misc]
    """A ``Conv2d24`` for inference on a CPU, whose weight is arranged once in row pairs, as ``arrange_conv24`` does.

    It stores the arranged weight and the bias. The state dict is that of ``Conv2d24``; loading it arranges the weight
    again, and so does ``to(dtype)``. On another device, without the compiled extension, in another dtype than float32,
    or where the input channels are no multiple of four, it stores ``values`` and ``bitmask`` and computes as
    ``Conv2d24`` does. Gradients reach the input and ``bias``. The weight cannot be trained: a call in training mode
    that would need its gradient raises.

    Args:
        packed: the weight, which is not kept.
        like: the ``nn.Conv2d``, or a layer in place of one, whose stride, padding, dilation and memory format it takes.
        bias: the bias Parameter, which becomes the layer's without a copy, or None.

    Raises:
        TypeError, ValueError: ``packed`` is no packed weight of a convolution.
    """

    def __init__(self, packed: PackedConv24, like: nn.Conv2d | CompressedConv2d, bias: nn.Parameter | None = None):
        nn.Module.__init__(self)
        check_packed_conv24(packed)
        geometry: Any = like.stride, like.padding, like.dilation
        self._take_geometry(packed.shape, strides_of(like), *geometry)
        stride, dilation = list(self.stride), list(self.dilation)
        pads, uneven = pads_of(self.padding, self.kernel_size, stride, dilation)  # type: ignore[arg-type]
        self.geometry = None if any(uneven) else (list(self.kernel_size), stride, pads, dilation)
        self._take(packed.values, packed.bitmask, bias)

    @classmethod
    def from_conv2d(cls: type[Layer], conv: nn.Conv2d) -> Layer:
        """Arranges the weight of a layer that ``Conv2d24.from_conv2d`` takes, with the same errors.

        The bias is the layer's own Parameter, not a copy, and so is a stored mask.
        """
        layer = cls(Conv2d24.from_conv2d(conv).packed, conv, conv.bias)  # type: ignore[arg-type, unused-ignore]
        carry_mask(conv, layer)
        return layer.train(conv.training)

    @classmethod
    def of(cls: type[Layer], packed: PackedConv24, like: nn.Conv2d | CompressedConv2d) -> Layer:
        """Returns a layer without a bias that holds this weight, with the geometry of another convolution."""
        return cls(packed, like)

    def _shape(self) -> tuple[int, int, int, int]:
        height, width = self.kernel_size
        return self.out_channels, self.in_channels, height, width

    def _arrange(self, values: Tensor, bitmask: Tensor) -> Tensor | None:
        if (
            values.device.type != "cpu"
            or values.dtype != torch.float32
            or self.in_channels % 4
            or backends()["arranged_conv2d24"]["cpu"] == "reference"
        ):
            return None
        return arrange_conv24(PackedConv24(values, bitmask, self._shape())).data

    def _restore(self, data: Tensor) -> tuple[Tensor, Tensor]:
        values, bitmask, _ = ArrangedConv24(data, self._shape()).to_packed()
        return values, bitmask

    def _packed_layer(self) -> Conv2d24:
        kernel: Any = self.kernel_size
        return Conv2d24(self.in_channels, self.out_channels, kernel, bias=False, device="meta", dtype=self.like.dtype)

    @property
    def arranged(self) -> ArrangedConv24 | None:
        """The arranged weight; None where the packed one is stored."""
        return None if self.data is None else ArrangedConv24(self.data, self._shape())

    @property
    def packed(self) -> PackedConv24:
        """The weight as ``pack_conv24`` returns it, rebuilt from the arranged one."""
        return PackedConv24(*self._packed_parts(), self._shape())

    def _unpack(self, *parts: Tensor) -> Tensor:
        first, second = parts
        if second.dim() != 1:
            return super()._unpack(first, second)
        return ArrangedConv24(second, self._shape()).to_dense()

    def _convolve_directly(self, input: Tensor) -> Tensor | None:
        """Computes ``_convolve`` where torch adds nothing to a call, without checks in Python; None where it cannot."""
        data = self._buffers["data"]
        if data is None or self.geometry is None or type(input) is not Tensor or not can_call_directly():
            return None
        if input.dim() != 4 or input.shape[1] != self.in_channels:
            return None
        try:
            return call_kernel(CONVOLUTION, input, data, self._parameters["bias"], self.out_channels, *self.geometry)
        except Exception:  # what follows says why
            return None

    def _convolve(self, input: Tensor) -> Tensor:
        if (output := self._convolve_directly(input)) is not None:
            return output
        self._check_training()
        arranged, dtype = self.arranged, autocast_dtype(input)
        if arranged is None or dtype not in (None, torch.float32):
            return super()._convolve(input)
        bias: Tensor | None = self.bias
        if dtype is not None:
            input, bias = input.to(dtype), None if bias is None else bias.to(dtype)
        geometry: Any = self.stride, self.padding, self.dilation
        return arranged_conv2d24(input, arranged, bias, *geometry)
