"""What convolutions have in common: the size of their result, and checks of their arguments."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ._define import check_ints

Pair = int | tuple[int, int]


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Returns the height or the width of the result."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def pair(name: str, value: Pair, least: int) -> list[int]:
    """Returns one number as two.

    Raises:
        TypeError: ``value`` is not one or two ints.
        ValueError: one is less than ``least``, or there are not two.
    """
    if not isinstance(value, int | Sequence):
        raise TypeError(f"{name} must be one or two numbers, got {value!r}")
    numbers = [value, value] if isinstance(value, int) else list(value)
    for each in numbers:
        check_ints(**{name: each})
    if len(numbers) != 2 or min(numbers) < least:
        raise ValueError(f"{name} must be one or two numbers of at least {least}, got {value!r}")
    return numbers


def pads_of(
    padding: Pair | str, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Returns how many zeros are around the image, and how many more at its end, where the kernel is even.

    Raises:
        TypeError, ValueError: ``padding`` is not what ``conv2d24`` takes.
    """
    if padding == "same":
        if list(stride) != [1, 1]:
            raise ValueError(f'padding="same" needs a stride of 1, got {tuple(stride)}')
        total = [d * (size - 1) for d, size in zip(dilation, kernel, strict=True)]
        return [each // 2 for each in total], [each % 2 for each in total]
    if isinstance(padding, str) and padding != "valid":
        raise ValueError(f'padding must be "valid", "same" or numbers, got {padding!r}')
    return pair("padding", 0 if isinstance(padding, str) else padding, 0), [0, 0]


def pad_unevenly(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Pair | str, dilation: Sequence[int]
) -> tuple[Tensor, list[int]]:
    """Returns the padding as two numbers, and ``x``, padded where one side needs more than the other."""
    pads, (height, width) = pads_of(padding, kernel, stride, dilation)
    return (F.pad(x, (0, width, 0, height)) if height or width else x), pads


def check_images(
    x: Tensor,
    inputs: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> None:
    """Raises a ValueError unless ``x`` has this number of channels and is at least as large as the kernel."""
    if x.dim() not in (3, 4) or x.shape[-3] != inputs:
        raise ValueError(
            f"x must have shape [images, {inputs}, height, width] or [{inputs}, height, width], got {tuple(x.shape)}"
        )
    if min(map(output_size, x.shape[-2:], kernel, stride, padding, dilation)) < 1:
        raise ValueError(
            f"x must be at least as large as the kernel, {tuple(kernel)} with dilation {tuple(dilation)} and padding "
            f"{tuple(padding)}, got an image of {tuple(x.shape[-2:])}"
        )
