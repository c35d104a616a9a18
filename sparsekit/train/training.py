"""The one verb: make a model train with 2:4 weights, in place and undoably."""

import math
from types import TracebackType
from typing import Literal

import torch
from torch import nn

from .._layers import (
    Where,
    check_model,
    check_where,
    declared_shape,
    input_dim,
    selects,
    shared_weight_reasons,
    unsupported_reason,
)
from ..compress.tune import RATIO
from ..masks import MaskInfo, Pattern, remove_mask, set_mask
from ..nn import Compressed, autocast_dtype, weight_shape
from ..ops import pack_bits, unpack_bits
from .choose import RATIOS, Kind
from .hardware import hardware_layout
from .layer import MaskedLinear, start, stop
from .product import Recipe
from .report import LayerReport, table

INFO = MaskInfo(Pattern(2, 4), 1)


class SparseTraining:
    """A model's training with 2:4 weights, until ``finish()`` or ``undo()``; ``str`` gives a table.

    Made by ``sparse_training_``. The end of a ``with`` calls ``undo()``, which changes nothing after ``finish()``.
    """

    def __init__(self, model: nn.Module, layers: dict[str, nn.Linear], skipped: tuple[LayerReport, ...]) -> None:
        self._model = model
        self._layers = layers
        self._skipped = skipped

    @property
    def layers(self) -> tuple[LayerReport, ...]:
        """Every layer that was selected: how it is multiplied now, on the device it is on and under this autocast."""
        return (*(_report(name, layer) for name, layer in self._layers.items()), *self._skipped)

    def __str__(self) -> str:
        return table(self.layers)

    @torch.no_grad()
    def finish(self) -> None:
        """Makes the weights what they were multiplied as: 2:4, in plain layers that have their masks stored.

        What the model computes stays the same. ``keep_masks``, ``compress_`` and ``save`` go on from there.

        Raises:
            ValueError: a weight contains NaN, or FSDP has sharded the model; nothing is changed then.
        """
        if any(base.__name__ == "FSDPModule" for module in self._model.modules() for base in type(module).__mro__):
            raise ValueError("the model is sharded by FSDP: finish a plain copy that has loaded its full state dict")
        bits = {}
        for name, layer in self._running():
            if torch.isnan(layer.weight).any():
                raise ValueError(f"the weight of {name or 'the model'} contains NaN: its training has diverged")
            bits[name] = pack_bits(layer.recipe.mask(layer.weight))
        for name, layer in self._running():
            mask = unpack_bits(bits[name], layer.in_features)
            layer.weight.masked_fill_(~mask, 0)
            set_mask(layer, mask, INFO)
            stop(layer)

    def undo(self) -> None:
        """Makes the layers plain ones again, with their dense weights as they are now."""
        for _, layer in self._running():
            stop(layer)

    def __enter__(self) -> "SparseTraining":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()

    def _running(self) -> list[tuple[str, MaskedLinear]]:
        return [(name, layer) for name, layer in self._layers.items() if isinstance(layer, MaskedLinear)]


def sparse_training_(
    model: nn.Module,
    *,
    backward: Literal["straight_through", "transposable"] = "straight_through",
    decay: float = 0.0,
    where: Where | None = None,
) -> SparseTraining:
    """Makes the linear layers of a model train with 2:4 weights, in place.

    Every call of a layer keeps the two largest magnitudes of every four consecutive inputs of its weight as it is then,
    and multiplies by these alone. The gradient reaches the whole dense weight behind, so that what is dropped can come
    back. The optimizer, new or used, goes on with the same Parameters; hooks, state dict, autocast, gradient
    checkpointing, ``torch.compile``, DDP and copies of the model work as before::

        with sk.sparse_training_(model) as training:
            for batch in batches:
                ...
            training.finish()
        sk.compress_(model)

    Where a GPU's 2:4 tensor cores take the shape, and the product is of 16 bits (by autocast, too), weights are packed
    anew in every call; but only at token counts where a forward and backward pass was measured to be right and at least
    1.05 times as fast as by a dense product with the masked weight. That is how all others train: as a dense layer,
    plus one pass over the weight. ``print(training)`` says which, and why. A process measures once per shape and power
    of two of tokens, at the first call, or when it is compiled, which waits for the GPU some tens of milliseconds. It
    measures nothing while a CUDA graph is captured: train a few steps before, or the graph multiplies densely.

    From the forward to the backward pass a layer holds one pruned or packed copy of its weight. Sharded by FSDP, a
    model trains as well, but it is finished in a plain copy that has loaded the full state dict.

    Layers whose weight is tied or read by their parent train dense, as do subclasses of ``nn.Linear``; the table says
    why. Stored masks of the others are forgotten. A layer that trains sparse already, in a copy of a model for
    instance, goes on by the new arguments.

    Args:
        model: any module tree.
        backward: ``"straight_through"`` multiplies the gradient of the input by the pruned weight as a dense matrix,
            because the transpose of a 2:4 weight is not 2:4. ``"transposable"`` chooses the best mask that keeps two
            of every four in both directions (https://arxiv.org/abs/2102.08124), so that this product can be sparse
            too; it drops a little more of the weight. The weight's gradient is dense and straight-through in both.
        decay: adds ``decay * weight`` to the gradients of dropped weights, which makes masks settle: SR-STE
            (https://arxiv.org/abs/2102.04010), where 2e-4 is used with SGD. Adam, which evens out the sizes of
            gradients, needs more: 0.05 served a small language model best. It is added in every backward pass: divide
            it by the number of passes that are accumulated, and multiply it by the scale of a gradient scaler.
        where: a predicate on ``(name, module)`` that selects layers; None selects all.

    Returns:
        A handle with ``finish()``, which makes the weights 2:4, and ``undo()``.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``backward`` or ``decay`` is none of the above, or no layer can be trained sparse.
    """
    check_model(model)
    if backward not in ("straight_through", "transposable"):
        raise ValueError(f'backward must be "straight_through" or "transposable", got {backward!r}')
    if not 0 <= decay < math.inf:
        raise ValueError(f"decay must be a number from 0, got {decay!r}")
    recipe = Recipe(backward, decay)
    layers, skipped = _find(model, where)
    if not layers:
        who = "the model has" if where is None else "where selects"
        reasons = "".join(f"; {layer.name}: {layer.reason}" for layer in skipped[:3])
        raise ValueError(f"nothing to train: {who} no layer that can be trained sparse{reasons}")
    for layer in layers.values():
        start(layer, recipe)
        remove_mask(layer)
    return SparseTraining(model, layers, skipped)


def _find(model: nn.Module, where: Where | None) -> tuple[dict[str, nn.Linear], tuple[LayerReport, ...]]:
    """The layers that ``where`` selects and that can train sparse, by name; and those that cannot."""
    layers: dict[str, nn.Linear] = {}
    check_where(where)
    skipped, shared = [], shared_weight_reasons(model)
    for name, module in model.named_modules():
        compressed = isinstance(module, Compressed)
        if not (compressed or input_dim(module) is not None) or not selects(where, name, module):
            continue
        if reason := shared.get((module, "weight")) or _unfit(module):
            skipped.append(
                LayerReport(name, weight_shape(module) if compressed else declared_shape(module), "plain", reason)
            )
        else:
            layers[name] = module
    return layers, tuple(skipped)


def _unfit(layer: nn.Module) -> str | None:
    """Why a layer must train dense; None where it can train sparse."""
    if isinstance(layer, Compressed):
        return unsupported_reason(layer)
    if type(layer) not in (nn.Linear, MaskedLinear):
        return f"it is a {type(layer).__name__}, only nn.Linear trains sparse"
    if "forward" in layer.__dict__:
        return "its forward is replaced"
    if type(layer) is nn.Linear and (reason := unsupported_reason(layer, prepare=True)):
        return reason
    cols = layer.get_parameter("weight").shape[1]
    return f"its {cols} inputs do not fill one group of 2:4" if cols < 4 else None


def _report(name: str, layer: nn.Linear) -> LayerReport:
    """How a layer is multiplied now."""
    weight, shape = layer.weight, tuple(layer.weight.shape)
    if not isinstance(layer, MaskedLinear):
        return LayerReport(name, shape, "plain", "its sparse training is over")
    dtype = autocast_dtype(weight) or weight.dtype
    layout, reason = hardware_layout(weight.device, dtype, weight.shape, layer.recipe.transposable)
    if layout is None:
        return LayerReport(name, shape, "masked dense", reason)
    ratios = RATIOS.get(Kind(weight.device, dtype, weight.shape, layer.recipe.transposable, layout), {})
    slower = ratios and max(ratios.values()) < RATIO
    measured = ", ".join(f"{ratio:.2f}x at {tokens} tokens" for tokens, ratio in sorted(ratios.items()))
    return LayerReport(name, shape, "masked dense" if slower else layout, f"{layout} is {measured}" if ratios else "")
