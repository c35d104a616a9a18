"""The dense convolution whose weight oneDNN has reordered."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._conv import pad_unevenly, pads_of
from ..ops.prepacked_conv import prepack_conv2d, prepacked_conv2d
from .common import autocast_dtype, carry_mask
from .compressed_conv import CompressedConv2d, check_conv2d, is_channels_last, strides_of
from .prepacked import Prepacked

Images = tuple[int, int, int]


class PrepackedConv2d(Prepacked, CompressedConv2d):
    """A dense convolution for inference on a CPU, whose weight oneDNN has reordered once instead of at every call.

    It stores the reordered weight and the bias. The state dict has the dense ``weight`` in the usual order; loading it
    reorders it again, and so does ``to(dtype)``. If oneDNN has no reordered form (on another device, or for a 16-bit
    dtype that the CPU does not compute in), the weight stays as it is and ``F.conv2d`` multiplies it. The result is
    channels last where that of ``nn.Conv2d`` is. Gradients reach the input and ``bias``. The weight cannot be trained:
    a call in training mode that would need its gradient raises.

    Args:
        weight: ``[out_channels, in_channels, height, width]``.
        like: the ``nn.Conv2d``, or a layer in place of one, whose stride, padding, dilation and memory format it takes.
        images: the number of images that the layout is chosen for, their height and their width. It is right for all
            others, and may be slower.
    """

    def __init__(self, weight: Tensor, like: nn.Conv2d | CompressedConv2d, images: Images = (1, 32, 32)):
        super().__init__()
        geometry: Any = like.stride, like.padding, like.dilation
        self._take_geometry(tuple(weight.shape), strides_of(like), *geometry)
        self.images = images
        self.frozen = weight.requires_grad
        self.channels_last = is_channels_last(torch.empty_strided(*self._layout(), device="meta"))
        self.pads, self.uneven = pads_of(self.padding, self.kernel_size, self.stride, self.dilation)  # type: ignore[arg-type]
        self.register_parameter("bias", None)
        self._prepack(weight)

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, *, images: Images = (1, 32, 32)) -> "PrepackedConv2d":
        """Reorders the weight of a layer. The bias is the layer's own Parameter, not a copy, and so is a stored mask.

        Raises:
            TypeError: ``conv`` is not an ``nn.Conv2d``.
            ValueError: it has groups, or pads with other values than zeros.
        """
        check_conv2d(conv)
        layer = cls(conv.weight, conv, images)
        layer.bias = conv.bias  # type: ignore[assignment, unused-ignore]
        carry_mask(conv, layer)
        return layer.train(conv.training)

    def _reorder(self, dense: Tensor) -> Tensor:
        count, height, width = self.images
        images = count, height + self.uneven[0], width + self.uneven[1]
        return prepack_conv2d(dense, images, self.stride, self.pads, self.dilation)

    def _convolve(self, input: Tensor) -> Tensor:
        self._check_call()
        padding: Any = self.padding
        transformed = torch._C._are_functorch_transforms_active()
        if not self.reordered or transformed or autocast_dtype(input) is not None:
            as_it_is = not self.reordered and not self.channels_last
            dense = self.packed if as_it_is else self._unpack_oriented(*self._parts())
            return F.conv2d(input, dense, self.bias, self.stride, padding, self.dilation)
        channels_last = self.channels_last or (input.dim() == 4 and is_channels_last(input))
        x, pads = pad_unevenly(input, self.kernel_size, self.stride, padding, self.dilation)
        return prepacked_conv2d(x, self.packed, self.bias, self.stride, pads, self.dilation, channels_last)
