"""Base class of compressed convolutions."""

from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._conv import Pair, pair
from .common import carry_mask, fx_node
from .compressed import Compressed


class CompressedConv2d(Compressed):
    """A compressed convolution with one group, padded with zeros.

    A subclass says besides how it convolves images (``_convolve``).
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    strides: tuple[int, ...]  # of the weight of the replaced layer, which may be channels last

    def _take_geometry(
        self, shape: tuple[int, ...], strides: tuple[int, ...], stride: Pair, padding: Pair | str, dilation: Pair
    ) -> None:
        """Sets what the layer is like, given the shape and the strides of its dense weight."""
        self.out_channels, self.in_channels, *kernel = shape
        self.kernel_size, self.strides = tuple(kernel), strides
        self.stride, self.dilation = tuple(pair("stride", stride, 1)), tuple(pair("dilation", dilation, 1))
        self.padding = padding if isinstance(padding, str) else tuple(pair("padding", padding, 0))

    def _convolve(self, input: Tensor) -> Tensor:
        """Computes ``forward`` for a tensor."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """Computes the convolution of ``[images, in_channels, height, width]``, as ``nn.Conv2d`` does."""
        if isinstance(input, torch.fx.Proxy):
            return fx_node(self, input)
        if not isinstance(input, Tensor):
            raise TypeError(f"input must be a tensor, got {type(input).__name__}")
        return self._convolve(input)

    def reference(self, input: Tensor) -> Tensor:
        bias: Tensor | None = self.bias
        bias = None if bias is None else bias.double()
        return F.conv2d(input.double(), self._dense().double(), bias, self.stride, self.padding, self.dilation)

    def _layout(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (self.out_channels, self.in_channels, *self.kernel_size), self.strides

    def _unpack_oriented(self, *parts: Tensor) -> Tensor:
        dense = self._unpack(*parts)
        return dense if dense.stride() == self.strides else dense.new_empty_strided(*self._layout()).copy_(dense)

    @torch.inference_mode(False)  # tensors made in inference mode could be neither trained nor used outside it
    def to_conv2d(self) -> nn.Conv2d:
        """Returns the dense ``nn.Conv2d`` that computes the same, with the same bias Parameter and stored mask."""
        geometry: dict[str, Any] = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        kernel: Any = self.kernel_size
        conv = nn.Conv2d(self.in_channels, self.out_channels, kernel, **geometry, bias=False, device="meta")
        with torch.no_grad():
            dense = self._unpack_oriented(*(part.detach() for part in self._parts()))
        conv.weight = nn.Parameter(dense, requires_grad=self.trainable)
        conv.register_parameter("bias", self.bias)
        carry_mask(self, conv)
        return conv.train(self.training)

    def to_plain(self) -> nn.Conv2d:
        return self.to_conv2d()

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, bias={self.bias is not None}"
        )


def check_conv2d(conv: nn.Module) -> None:
    """Rejects anything but an ``nn.Conv2d`` of one group that pads with zeros.

    Raises:
        TypeError: it is none.
        ValueError: it has groups, or pads with other values.
    """
    if not isinstance(conv, nn.Conv2d):
        raise TypeError(f"conv must be an nn.Conv2d, got {type(conv).__name__}")
    if conv.groups != 1 or conv.padding_mode != "zeros":
        raise ValueError(
            f'conv must have one group and padding_mode "zeros", got {conv.groups} and "{conv.padding_mode}"'
        )


def strides_of(conv: nn.Conv2d | CompressedConv2d) -> tuple[int, ...]:
    """Returns the strides of a copy of a convolution's dense weight, which keeps its order in memory."""
    return conv.strides if isinstance(conv, CompressedConv2d) else torch.empty_like(conv.weight, device="meta").stride()


def is_channels_last(images: Tensor) -> bool:
    """Returns whether ``F.conv2d`` takes images to lie in memory position by position, not channel by channel.

    It goes by the strides, as ATen's ``suggest_memory_format`` does: those of a part of a channels last tensor are so,
    and those of a single channel may be either.
    """
    least = 0
    sizes, strides = images.shape, images.stride()
    for dim in (1, 3, 2, 0):
        if sizes[dim] == 0 or strides[dim] < least or strides[1] == 0 or (dim == 0 and least == strides[1]):
            return False
        least = strides[dim] * sizes[dim]
    return True
