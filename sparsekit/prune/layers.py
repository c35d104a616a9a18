"""The layers of a model that can be pruned, and which inputs each weight is multiplied by."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._layers import (
    Where,
    check_where,
    expert_axes,
    input_dim,
    selects,
    shared_weight_reasons,
    unsupported_reason,
)
from ..masks import Axis, Pattern, grouped
from .report import Skipped
from .skipped import never_pruned

WINDOW_BYTES = 2**26
ExpertAxes = Mapping[nn.Module, dict[str, int]]  # by module and name of a parameter: the dimension of its inputs


@dataclass(frozen=True)
class PrunableLayer:
    """A layer that can be pruned.

    Args:
        name: its name in the model; for experts, which are a parameter, the name of the parameter.
        module: the module that holds the weight.
        axis: the weight dimension that the groups run along.
        parameter: the name of the parameter that is the weight.
        expert: the index of the matrix in that parameter, for one expert; None if the layer is the whole parameter.
    """

    name: str
    module: nn.Module
    axis: Axis
    parameter: str = "weight"
    expert: int | None = None

    @property
    def weight(self) -> Tensor:
        """The Parameter; for one expert, its matrix in the Parameter, without a gradient."""
        weight = self.module.get_parameter(self.parameter)
        return weight if self.expert is None else weight.detach()[self.expert]

    @property
    def path(self) -> str:
        """The name of the module."""
        return self.name if self.parameter == "weight" and not self.experts else self.name[: -len(self.parameter) - 1]

    @property
    def weight_name(self) -> str:
        """The name of the weight in the model."""
        return f"{self.path}.{self.parameter}".lstrip(".")

    @property
    def experts(self) -> tuple["PrunableLayer", ...]:
        """A layer for each expert if the parameter has three dimensions; else empty."""
        weight = self.module.get_parameter(self.parameter)
        if self.expert is not None or weight.dim() != 3 or not isinstance(self.axis, int):
            return ()
        name, axis = self.name, self.axis - 1
        return tuple(PrunableLayer(f"{name}[{e}]", self.module, axis, self.parameter, e) for e in range(len(weight)))

    def matrix(self, weight: Tensor) -> Tensor:
        """Returns ``weight`` as ``[outputs, inputs]``, with its columns in the order of ``windows``."""
        return weight.t() if self.axis == 0 else weight.flatten(1)

    @property
    def input_shape(self) -> torch.Size:
        """The shape of the inputs of one output: ``[inputs]``, or ``[channels, kernel height, kernel width]``."""
        weight = self.weight
        return weight.shape[1:] if isinstance(self.module, nn.Conv2d) else self.matrix(weight).shape[1:]

    def windows(self, x: Tensor) -> Tensor:
        """Returns all input vectors in ``x`` that the weight is multiplied by.

        Their shape is ``[tokens, inputs]``; for a Conv2d they are a view
        ``[images, height, width, channels, kernel height, kernel width]``.
        """
        conv = self.module
        if not isinstance(conv, nn.Conv2d):
            return x.reshape(-1, x.shape[-1])
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = F.pad(x if x.dim() == 4 else x.unsqueeze(0), conv._reversed_padding_repeated_twice, mode=mode)
        (height, width), (stride_y, stride_x) = conv.kernel_size, conv.stride
        dilation_y, dilation_x = conv.dilation
        view = x.unfold(2, dilation_y * (height - 1) + 1, stride_y).unfold(3, dilation_x * (width - 1) + 1, stride_x)
        return view[..., ::dilation_y, ::dilation_x].permute(0, 2, 3, 1, 4, 5)

    def rows(self, x: Tensor) -> Iterator[Tensor]:
        """Yields the input vectors in ``x`` as float32 ``[tokens, inputs]``, with columns in the order of ``grouped``.

        The windows of images overlap, so they come in parts of at most ``WINDOW_BYTES``, or of one line of the output.
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
        """Sums the squares of an input over all positions; returns the sums and the number of positions.

        The sums have the shape ``input_shape``.
        """
        squares = x.float().square()
        images = 1
        if isinstance(self.module, nn.Conv2d) and x.dim() == 4:
            images, squares = len(x), squares.sum(0, keepdim=True)  # before the windows, which repeat each pixel
        windows = self.windows(squares)
        positions = windows.shape[: windows.dim() - self.weight.dim() + 1]
        return windows.sum(tuple(range(len(positions)))), images * positions.numel()


def find_layers(
    model: nn.Module,
    pattern: Pattern,
    axis: Literal["input", "flatten"],
    where: Where | None,
    observed: ExpertAxes | None = None,
) -> tuple[list[PrunableLayer], list[Skipped]]:
    """Finds the layers that ``where`` selects and that can be pruned, and what else it selects, with the reasons.

    The second list has every other parameter with at least two dimensions and one group, and why it is not pruned.
    ``observed`` has the parameters that a calibration pass has shown to be experts.
    """
    check_where(where)
    layers, skipped, never = list[PrunableLayer](), list[Skipped](), list[Skipped]()
    shared = shared_weight_reasons(model, fast_paths=False)
    for name, module in model.named_modules():
        found = list(_layers_of(name, module, axis, observed or {}))
        left = list(never_pruned(name, module, pattern, {layer.parameter for layer in found}))
        if not (found or left) or not selects(where, name, module):
            continue
        for layer in found:
            key = layer.parameter
            reason = unsupported_reason(module, key) or shared.get((module, key)) or _pattern_reason(layer, pattern)
            if reason:
                skipped.append(Skipped(layer.name, reason))
            else:
                layers.append(layer)
        never += left
    return layers, skipped + never


def differentiable_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the weights of all layers that are parameters of floating-point numbers, by the layer's name."""
    layers = [each for name, module in model.named_modules() for each in _layers_of(name, module, "input", {})]
    weights = {layer.name: layer.module._parameters.get(layer.parameter) for layer in layers}
    return {
        name: weight
        for name, weight in weights.items()
        if weight is not None and not is_lazy(weight) and weight.is_floating_point()
    }


def _layers_of(
    name: str, module: nn.Module, axis: Literal["input", "flatten"], observed: ExpertAxes
) -> Iterator[PrunableLayer]:
    """Yields the layers of a module, whether or not they can be pruned."""
    if (dim := input_dim(module)) is not None:
        yield PrunableLayer(name, module, "flatten" if axis == "flatten" and isinstance(module, nn.Conv2d) else dim)
        return
    for key, along in (expert_axes(module) | observed.get(module, {})).items():
        yield PrunableLayer(f"{name}.{key}".lstrip("."), module, along, key)


def _pattern_reason(layer: PrunableLayer, pattern: Pattern) -> str | None:
    """Returns why a layer cannot have the pattern; None if it can."""
    module = layer.module
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return f"it is a convolution of {module.groups} groups, and no N:M kernel runs those"
    cols = grouped(layer.weight, layer.axis).shape[-1]
    return f"its {cols} inputs do not fill one group of {pattern}" if cols < (pattern.m or 1) else None


def nothing_to(do: str, what: str, where: Where | None, skipped: Sequence[Skipped]) -> str:
    """Returns the error message for a model without a layer to prune (or to ``do`` something else), with reasons."""
    who = "the model has" if where is None else "where selects"
    return f"nothing to {do}: {who} no {what}{first_reasons(skipped)}"


def first_reasons(skipped: Sequence[Skipped]) -> str:
    """Returns the end of a sentence that names the first skipped layers with their reasons."""
    return "".join(f"; {layer.name or 'the model'}: {layer.reason}" for layer in skipped[:3])


def check_weights(layers: list[PrunableLayer]) -> None:
    """Rejects NaN in a weight, which would rank above all numbers, and infinities, which no method can handle.

    Raises:
        ValueError: names the first layer that has one.
    """
    for layer in layers:
        if not _is_finite(layer.weight.detach()):
            raise ValueError(f"the weight of {layer.name or 'the model'} contains NaN or Inf; prune_ needs numbers")


def check_result(layer: PrunableLayer, pruned: Tensor, method: object) -> None:
    """Rejects a new weight that its dtype cannot hold.

    Raises:
        ValueError: names the layer.
    """
    if not _is_finite(pruned):
        raise ValueError(
            f"{method} gives {layer.name or 'the model'} a weight that is NaN or infinite in {pruned.dtype}: prune the "
            "model in bfloat16 or float32, or by a method that keeps the values of the weights"
        )


def _is_finite(weight: Tensor) -> bool:
    """Returns ``isfinite(weight).all()`` without a copy: minimum and maximum are NaN if any entry is."""
    return all(math.isfinite(value) for value in weight.aminmax())
