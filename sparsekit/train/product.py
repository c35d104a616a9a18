"""The product of sparse training: forward by the pruned weight, the weight's gradient to the dense one."""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from ..nn import autocast_dtype
from ..ops import nm_mask, transposable_mask
from ..ops.train24 import train_linear24, train_prune24


@dataclass(frozen=True)
class Recipe:
    """How a layer trains, in the words of ``sparse_training_``."""

    backward: Literal["straight_through", "transposable"]
    decay: float

    @property
    def transposable(self) -> bool:
        return self.backward == "transposable"

    def mask(self, weight: Tensor) -> Tensor:
        """What is kept of a weight: bool, in its shape."""
        return transposable_mask(weight) if self.transposable else nm_mask(weight, 2, 4)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, recipe: Recipe, layout: str | None) -> Tensor:
    """Computes ``x @ pruned.T + bias``, where ``pruned`` is what the recipe's mask leaves of ``weight``.

    Gradients of ``x`` and ``bias`` are those of this product. ``weight`` gets the gradient of ``pruned``, also where
    nothing was kept, plus ``decay * (weight - pruned)``. Autocast follows ``F.linear``; masks are always those of the
    weight as it is stored.

    Nothing is kept from one call to the next. A cache could not know when it is stale: fused optimizers, writes through
    ``.data`` and FSDP's gathering change a weight without a new ``_version``.

    Args:
        x, weight, bias: as those of ``F.linear``.
        recipe: chooses the mask.
        layout: the hardware layout that is multiplied; None for a dense product with the pruned weight.
    """
    autocast = autocast_dtype(x)
    dtype = autocast or weight.dtype
    # What packs a weight both ways prunes it, too; but it ranks what it is given, and knows no decay.
    if layout is None or not recipe.transposable or recipe.decay or weight.dtype != dtype:
        weight = train_prune24(weight, transposable=recipe.transposable, decay=recipe.decay)
    if layout is None:
        return F.linear(x, weight, bias)
    if autocast is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return train_linear24(x, weight, bias, transposable=recipe.transposable, layout=layout)
