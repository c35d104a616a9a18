"""The convolution on the packed 2:4 format."""

import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..masks import get_mask
from ..ops import PackedConv24, conv2d24, nm_mask, pack_conv24, unpack_bits
from ..ops._conv import Pair
from ..ops._define import DTYPES, check_like, check_weight
from .common import autocast_dtype, carry_mask
from .compressed_conv import CompressedConv2d, check_conv2d, strides_of
from .linear24 import check_bitmask24

Layer = TypeVar("Layer", bound="Conv2d24")


class Conv2d24(CompressedConv2d):
    """A convolution whose weight is stored and multiplied in the packed 2:4 format, along its input channels.

    It stores three tensors, which are also its state dict: ``values``, a Parameter that gradients reach, and
    ``bitmask``, a uint8 buffer, both as in ``PackedConv24``; and ``bias``. A new layer draws its weight as
    ``nn.Conv2d`` does and keeps the two largest magnitudes of every four input channels. Under autocast it computes in
    the dtype in which ``F.conv2d`` would.

    Args:
        in_channels: any number; the last ``in_channels % 4`` are stored whole.
        out_channels: any number.
        kernel_size: one number, or height and width.
        stride, padding, dilation: as ``conv2d24`` takes them; padding is always with zeros.
        bias: whether a bias is added.
        device: where the tensors are made.
        dtype: float32, float16 or bfloat16; None is torch's default.

    Raises:
        TypeError: ``dtype`` is another one.
    """

    values: nn.Parameter
    bitmask: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair | str = 0,
        dilation: Pair = 1,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if (dtype or torch.get_default_dtype()) not in DTYPES:
            raise TypeError(f"dtype must be float32, float16 or bfloat16, got {dtype or torch.get_default_dtype()}")
        height, width = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        shape = (out_channels, in_channels, height, width)
        strides = torch.empty(shape, device="meta").stride()
        self._take_geometry(shape, strides, stride, padding, dilation)
        bound = 1 / math.sqrt(max(in_channels * height * width, 1))
        rows = torch.empty(out_channels * height * width, in_channels, device=device, dtype=dtype)
        rows.uniform_(-bound, bound)
        weight, mask = (
            each.view(out_channels, height, width, in_channels).permute(0, 3, 1, 2)
            for each in (rows, nm_mask(rows, 2, 4))
        )
        values, bitmask, _ = pack_conv24(weight, mask, check=False)
        self.values = nn.Parameter(values)
        self.register_buffer("bitmask", bitmask)
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype).uniform_(-bound, bound))

    @classmethod
    @torch.inference_mode(False)  # tensors made in inference mode could be neither trained nor used outside it
    def from_conv2d(cls: type[Layer], conv: nn.Conv2d) -> Layer:
        """Packs a convolution that is 2:4: the entries that its stored mask keeps, or without one, its non-zeros.

        A stored mask may keep fewer than two of a group, but not more. The bias is the layer's own Parameter, not a
        copy, and so is the stored mask.

        Raises:
            TypeError: the weight is not float32, float16 or bfloat16, or ``conv`` is not an ``nn.Conv2d``.
            ValueError: it has groups, or pads with other values than zeros, or a group of four input channels keeps
                more than two; the message names the first one.
        """
        check_conv2d(conv)
        weight, mask = conv.weight.detach(), get_mask(conv)
        if mask is not None:
            bits = pack_conv24(mask.to(weight.dtype), check=True).bitmask
            outputs, inputs, height, width = weight.shape
            rows = unpack_bits(bits.flatten(0, 1), inputs)
            mask = rows.view(outputs, height, width, inputs).permute(0, 3, 1, 2)
        layer = cls.of(pack_conv24(weight, mask, check=True), conv)
        layer.values.requires_grad_(conv.weight.requires_grad)
        layer.bias = conv.bias  # type: ignore[assignment, unused-ignore]
        carry_mask(conv, layer)
        return layer.train(conv.training)

    @classmethod
    def of(cls: type[Layer], packed: PackedConv24, like: nn.Conv2d | CompressedConv2d) -> Layer:
        """Returns a layer without a bias that holds these tensors, with the geometry of another convolution."""
        outputs, inputs, height, width = packed.shape
        geometry: dict[str, Any] = {"stride": like.stride, "padding": like.padding, "dilation": like.dilation}
        dtype = packed.values.dtype
        layer = cls(inputs, outputs, (height, width), **geometry, bias=False, device="meta", dtype=dtype)
        layer.values, layer.bitmask = nn.Parameter(packed.values), packed.bitmask
        layer.strides = strides_of(like)
        return layer

    @property
    def trainable(self) -> bool:
        return self.values.requires_grad

    @property
    def packed(self) -> PackedConv24:
        """The weight as ``pack_conv24`` returns it, made of the layer's own tensors."""
        return self._pack(self.values, self.bitmask)

    def _pack(self, values: Tensor, bitmask: Tensor) -> PackedConv24:
        height, width = self.kernel_size
        return PackedConv24(values, bitmask, (self.out_channels, self.in_channels, height, width))

    def _parts(self) -> tuple[Tensor, ...]:
        return self.values, self.bitmask

    def _unpack(self, *parts: Tensor) -> Tensor:
        values, bitmask = parts
        return self._pack(values, bitmask).to_dense()

    def _convolve(self, input: Tensor) -> Tensor:
        packed, bias = self.packed, self.bias
        if (dtype := autocast_dtype(input)) is not None:
            input, packed = input.to(dtype), packed._replace(values=packed.values.to(dtype))
            bias = None if bias is None else bias.to(dtype)  # type: ignore[assignment]
        geometry: Any = self.stride, self.padding, self.dilation
        return conv2d24(input, packed, bias, *geometry)

    def _check_state(self, given: dict[str, Tensor], assigned: bool) -> None:
        if assigned and "values" in given:
            check_weight("values", given["values"])
        bitmask = given.get("bitmask")
        if bitmask is None or bitmask.is_meta or bitmask.shape != self.bitmask.shape:
            return  # torch loads what is on the meta device, and reports a missing bitmask or another shape itself
        check_like("bitmask", bitmask, torch.uint8, bitmask.shape, bitmask)
        check_bitmask24(bitmask.flatten(0, 1), self.in_channels)
