"""The sizes of the inputs that layers get: numbers of tokens or, for a convolution, images."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import _timing
from ..nn.compressed_conv import is_channels_last

# More are as good as this many for a ratio, and take longer to measure.
MAX_TOKENS, MAX_GPU_TOKENS = 512, 8192
MAX_POSITIONS = 4096  # of all images together, where one alone has no more


class Images(NamedTuple):
    """The images that a convolution gets.

    Args:
        images: how many.
        height, width: of each.
        channels_last: whether they lie in memory position by position, not channel by channel.
    """

    images: int
    height: int
    width: int
    channels_last: bool = False

    def __str__(self) -> str:
        return f"{self.images}x{self.height}x{self.width}{' channels last' if self.channels_last else ''}"


Size = int | Images  # tokens or images


def extent(size: Size) -> int:
    """Returns how many tokens or positions a size has."""
    return size if isinstance(size, int) else size.images * size.height * size.width


def size_of(layer: nn.Module, x: Tensor) -> Size | None:
    """Returns the bucket for the size of a layer's input: counts are rounded up; None if it is empty."""
    if isinstance(layer, nn.Conv2d):
        count, height, width = x.shape[0] if x.dim() == 4 else 1, *x.shape[-2:]
        most = max(MAX_POSITIONS // max(height * width, 1), 1)
        channels_last = x.dim() == 4 and is_channels_last(x)
        return Images(min(_power_of_two(count), most), height, width, channels_last) if x.numel() else None
    tokens = sum(part.shape[:-1].numel() for part in (x.unbind() if x.is_nested else [x]))
    return bucket(tokens, x.device) if tokens else None


def bucket(tokens: int, device: torch.device) -> int:
    """Returns the power of two that a token count is rounded up to, within the limit of a device."""
    return min(_power_of_two(tokens), MAX_GPU_TOKENS if _timing.is_gpu(device) else MAX_TOKENS)


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def at_size(size: Size) -> str:
    """Returns ``"at 1 token"``, ``"at 16 tokens"``, ``"at 4x32x32"``."""
    return f"at {size} token" if size == 1 else f"at {size} tokens" if isinstance(size, int) else f"at {size}"


def reported(size: Size) -> int | str:
    """Returns a size as reports have it: a number of tokens, or text such as ``"4x32x32"``."""
    return size if isinstance(size, int) else str(size)
