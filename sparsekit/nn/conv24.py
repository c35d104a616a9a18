"""The convolution on the packed 2:4 format."""

import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..masks import get_mask
from ..ops import PackedConv24, conv2d24, nm_mask, pack_conv24, unpack_bits
from ..ops._define import DTYPES, check_like
from .common import autocast_dtype, carry_mask
from .linear24 import check_bitmask24

Pair = int | tuple[int, int]
Layer = TypeVar("Layer", bound="Conv2d24")


class Conv2d24(nn.Module):
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
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, (height, width)
        self.stride, self.padding, self.dilation = stride, padding, dilation
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
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv must be an nn.Conv2d, got {type(conv).__name__}")
        if conv.groups != 1 or conv.padding_mode != "zeros":
            raise ValueError(
                f'conv must have one group and padding_mode "zeros", got {conv.groups} and "{conv.padding_mode}"'
            )
        weight, mask = conv.weight.detach(), get_mask(conv)
        if mask is not None:
            bits = pack_conv24(mask.to(weight.dtype), check=True).bitmask
            outputs, inputs, height, width = weight.shape
            rows = unpack_bits(bits.flatten(0, 1), inputs)
            mask = rows.view(outputs, height, width, inputs).permute(0, 3, 1, 2)
        values, bitmask, _ = pack_conv24(weight, mask, check=True)
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            False,
            device="meta",
            dtype=weight.dtype,
        )
        layer.values = nn.Parameter(values, requires_grad=conv.weight.requires_grad)
        layer.bitmask = bitmask
        layer.bias = conv.bias  # type: ignore[assignment, unused-ignore]
        carry_mask(conv, layer)
        return layer.train(conv.training)

    @torch.inference_mode(False)
    def to_conv2d(self) -> nn.Conv2d:
        """Returns the dense ``nn.Conv2d`` that computes the same, with the same bias Parameter and stored mask."""
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            bias=False,
            device="meta",
        )
        dense = self.packed._replace(values=self.values.detach()).to_dense()
        conv.weight = nn.Parameter(dense, requires_grad=self.values.requires_grad)
        conv.register_parameter("bias", self.bias)
        carry_mask(self, conv)
        return conv.train(self.training)

    @property
    def packed(self) -> PackedConv24:
        """The weight as ``pack_conv24`` returns it, made of the layer's own tensors."""
        return PackedConv24(self.values, self.bitmask, (self.out_channels, self.in_channels, *self.kernel_size))

    @property
    def weight(self) -> Tensor:
        """The dense weight, unpacked whenever it is read; its gradients reach ``values``."""
        return self.packed.to_dense()

    def forward(self, input: Tensor) -> Tensor:
        """Computes the convolution of ``[images, in_channels, height, width]``, as ``nn.Conv2d`` does."""
        packed, bias = self.packed, self.bias
        if (dtype := autocast_dtype(input)) is not None:
            input, packed = input.to(dtype), packed._replace(values=packed.values.to(dtype))
            bias = None if bias is None else bias.to(dtype)  # type: ignore[assignment]
        return conv2d24(input, packed, bias, self.stride, self.padding, self.dilation)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        bitmask = state_dict.get(prefix + "bitmask")
        try:
            if isinstance(bitmask, Tensor) and not bitmask.is_meta and bitmask.shape == self.bitmask.shape:
                check_like("bitmask", bitmask, torch.uint8, bitmask.shape, bitmask)
                check_bitmask24(bitmask.flatten(0, 1), self.in_channels)
        except (TypeError, ValueError) as error:
            error_msgs: list[str] = rest[-1]
            error_msgs.append(f"layer {prefix[:-1]}: {error}" if prefix else str(error))
        else:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, bias={self.bias is not None}"
        )
