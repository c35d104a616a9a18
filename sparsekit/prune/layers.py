"""Which layers can be pruned, and how each one meets its inputs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._layers import Where, borrowed, input_dim
from ..masks import Axis, Pattern, grouped
from ..nn import Compressed
from ..ops._define import DTYPES
from .report import Skipped

WINDOW_BYTES = 2**26


@dataclass(frozen=True)
class Layer:
    """A layer that can be pruned: its name in the model, the module, the axis its groups run along, and which of the
    module's parameters is its weight.
    """

    name: str
    module: nn.Module
    axis: Axis
    parameter: str = "weight"

    @property
    def weight(self) -> nn.Parameter:
        return self.module.get_parameter(self.parameter)

    def matrix(self, weight: Tensor) -> Tensor:
        """``weight`` as ``[outputs, inputs]``, its columns in the order of ``windows``."""
        return weight.t() if self.axis == 0 else weight.flatten(1)

    @property
    def input_shape(self) -> torch.Size:
        """What one output's weights meet: ``[inputs]``, or ``[channels, kernel height, kernel width]``."""
        weight = self.weight
        return weight.shape[1:] if isinstance(self.module, nn.Conv2d) else self.matrix(weight).shape[1:]

    def windows(self, x: Tensor) -> Tensor:
        """Everything that the weight meets in an input ``x``: ``[tokens, inputs]``, or for a Conv2d the view
        ``[images, height, width, channels, kernel height, kernel width]``.
        """
        conv = self.module
        if not isinstance(conv, nn.Conv2d):
            return x.reshape(-1, x.shape[-1])
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = F.pad(x if x.dim() == 4 else x.unsqueeze(0), conv._reversed_padding_repeated_twice, mode=mode)
        (high, wide), (down, right), (row, col) = conv.kernel_size, conv.stride, conv.dilation
        view = x.unfold(2, row * (high - 1) + 1, down).unfold(3, col * (wide - 1) + 1, right)
        return view[..., ::row, ::col].permute(0, 2, 3, 1, 4, 5)

    def rows(self, x: Tensor) -> Iterator[Tensor]:
        """What the weight meets in ``x``: float32 ``[tokens, inputs]``, in the order of ``grouped``.

        Windows of images overlap, so they come in parts of at most ``WINDOW_BYTES``, or of one line of the output.
        """
        windows = self.windows(x)
        if not isinstance(self.module, nn.Conv2d):
            yield windows.float()
            return
        windows = windows if self.axis == "flatten" else windows.permute(0, 1, 2, 4, 5, 3)
        lines = max(WINDOW_BYTES // max(4 * windows[0, 0].numel(), 1), 1) if windows.numel() else 1
        for images in windows.split(max(lines // max(windows.shape[1], 1), 1)):
            for part in images.split(lines, 1):
                yield part.flatten(3).flatten(0, 2).float()

    def square_sums(self, x: Tensor) -> tuple[Tensor, int]:
        """Sums the squares of an input over all positions: ``([inputs] or [channels, kernel...], positions)``."""
        squares = x.float().square()
        images = 1
        if isinstance(self.module, nn.Conv2d) and x.dim() == 4:
            images, squares = len(x), squares.sum(0, keepdim=True)  # before the windows, which would copy each pixel
        windows = self.windows(squares)
        positions = windows.shape[: windows.dim() - self.weight.dim() + 1]
        return windows.sum(tuple(range(len(positions)))), images * positions.numel()


def find_layers(
    model: nn.Module, pattern: Pattern, axis: Literal["input", "flatten"], where: Where | None
) -> tuple[list[Layer], list[Skipped]]:
    """The layers that ``where`` selects and that can be pruned; and those that cannot, each with the reason."""
    layers, skipped = [], []
    reasons = borrowed(model)
    for name, module in model.named_modules():
        if isinstance(module, Compressed) and (where is None or where(name, module)):
            skipped.append(Skipped(name, "it is compressed: call decompress_ first"))
        if (dim := input_dim(module)) is None or (where is not None and not where(name, module)):
            continue
        layer = Layer(name, module, "flatten" if axis == "flatten" and isinstance(module, nn.Conv2d) else dim)
        if reason := reasons.get(module) or _unfit(layer, pattern):
            skipped.append(Skipped(name, reason))
        else:
            layers.append(layer)
    return layers, skipped


def _unfit(layer: Layer, pattern: Pattern) -> str | None:
    """Why this pattern cannot be put on this layer; None where it can."""
    weight, module = layer.module.weight, layer.module
    if not isinstance(weight, nn.Parameter):
        return "its weight is not a parameter but computed"
    if weight.is_meta:
        return "its weight is on the meta device: load it first"
    if weight.dtype not in DTYPES:
        return f"its weight is {weight.dtype}, not float32, float16 or bfloat16"
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return f"it is a convolution of {module.groups} groups, and no N:M kernel runs those"
    if weight.numel() == 0:
        return "its weight is empty"
    cols = grouped(weight, layer.axis).shape[-1]
    if cols < (pattern.m or 1):
        return f"its {cols} inputs do not fill one group of {pattern}"
    return None


def check_weights(layers: list[Layer]) -> None:
    """Rejects weights that are NaN, which would rank above everything, or infinite, which no method can work with.

    Raises:
        ValueError: names the first layer that has one.
    """
    for layer in layers:
        if not torch.isfinite(layer.weight).all():
            raise ValueError(f"the weight of {layer.name or 'the model'} contains NaN or Inf; prune_ needs numbers")


def check_result(layer: Layer, pruned: Tensor, method: object) -> None:
    """Rejects a new weight that its dtype cannot hold.

    Raises:
        ValueError: names the layer.
    """
    if not torch.isfinite(pruned).all():
        raise ValueError(
            f"{method} gives {layer.name or 'the model'} a weight that is NaN or infinite in {pruned.dtype}: prune the "
            "model in bfloat16 or float32, or by a method that keeps the values of the weights"
        )
